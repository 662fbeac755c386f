"""The launch configs are read by accelerate's own classes, and ask for what their names say."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

CONFIGS = sorted((Path(__file__).parent.parent / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_accelerate_reads_the_config(file):
    config = load_config_from_file(str(file))
    assert isinstance(config, ClusterConfig)
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "examples/run_xlm.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.mixed_precision == "bf16"
    assert arguments.num_processes == 8 * arguments.num_machines
    kind = file.stem.split("_")[0]
    assert (arguments.multi_gpu, arguments.use_fsdp, arguments.use_deepspeed) == (
        kind == "ddp",
        kind == "fsdp2",
        kind == "deepspeed",
    )
    if kind == "fsdp2":
        assert str(arguments.fsdp_version) == "2"
        assert arguments.fsdp_state_dict_type == "FULL_STATE_DICT"
    if kind == "deepspeed":
        assert str(arguments.zero_stage) == file.stem[-1]
