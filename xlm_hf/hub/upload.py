"""Uploads to the Hub: whole repositories, and one sentence where something is in the way."""

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from transformers import AutoModel, AutoTokenizer, Trainer
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from xlm_hf.files import INCOMPLETE_SUFFIX
from xlm_hf.hub.export import export_model
from xlm_hf.training.averages import load_average
from xlm_hf.training.checkpoints import resolve_checkpoint

logger = logging.getLogger(__name__)

# What is never uploaded: what a write that was cut off has left, and hidden files.
_LEFT_OUT = [f"*{INCOMPLETE_SUFFIX}*", ".*"]
# Weights in one file hide newer ones in shards, so those of an earlier push must go.
_EARLIER_WEIGHTS = "model*.safetensors*"


@contextlib.contextmanager
def hub_errors(repo_id: str, remedy: str = "the same command tries again") -> Iterator[None]:
    """Turn what the Hub refuses into an OSError of one sentence, with the remedy."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise OSError(_refusal(repo_id, 401, "")) from error
    except OfflineModeIsEnabled as error:
        raise OSError(f"{repo_id} cannot be reached because HF_HUB_OFFLINE is set: unset it to use the Hub.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise OSError(_refusal(repo_id, status, error.server_message or f"status {status}")) from error
    except ValueError:
        # A name that no repository can have, which the client says well.
        raise
    except Exception as error:
        # The client passes on whatever its libraries raise when a connection breaks.
        cause = str(error).rstrip(".") or type(error).__name__
        kept = f"{repo_id} is as it was, all is kept here, and {remedy}"
        raise OSError(f"The connection to the Hub broke off ({cause}): {kept}.") from error


def _refusal(repo_id: str, status: int, message: str) -> str:
    """What a status of HTTP means here, and the remedy."""
    reason = " ".join(message.split()).rstrip(".")
    remedy = "name a repository of your own, or use a token with write access"
    sentences = {
        401: f"Writing {repo_id} needs a token of the Hub: set HF_TOKEN, or log in by `hf auth login`.",
        403: f"This token may not write {repo_id} ({reason}): {remedy}.",
        404: f"There is no model {repo_id} on the Hub, or it is private and this token may not read it.",
        409: f"{repo_id} exists already: add exist_ok=true to add a commit to it, or choose another name.",
    }
    other = f"The Hub refused {repo_id} ({reason}); everything is kept here, and the same command tries again."
    return sentences.get(status, other)


def push_folder(folder: Path, repo_id: str, private: bool | None, token: str | None, exist_ok: bool) -> str:
    """Create a repository and upload the files of a folder in one commit.

    Args:
        folder: see `xlm_hf.export_model`.
        repo_id: `user/name`.
        private: whether a new repository is private; None leaves it to the account.
        token: of the Hub; None takes that of HF_TOKEN or `hf auth login`.
        exist_ok: whether the repository may exist, and then gets a further commit.

    Returns:
        the address of the repository.

    Raises:
        OSError: one sentence, if the Hub refuses or cannot be reached.
    """
    api = HfApi(token=token)
    with hub_errors(repo_id):
        url = api.create_repo(repo_id, private=private, exist_ok=exist_ok)
    with hub_errors(repo_id, "the same command with exist_ok=true tries again"):
        _upload(api, url.repo_id, folder, "Upload model")
    return str(url)


def _upload(api: HfApi, repo_id: str, folder: Path, message: str | None, **options: Any) -> Any:
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=message,
        ignore_patterns=[*_LEFT_OUT],
        delete_patterns=_EARLIER_WEIGHTS,
        **options,
    )


def _warn_of_failure(step: int, error: Exception) -> None:
    logger.warning("Training goes on, and the push of step %d has failed. %s", step, error)


class PushesRepositories(Trainer):
    """The pushes of `Trainer` as self-contained repositories: weights, configurations, tokenizer, code and card.

    transformers uploads `output_dir` with its logs, and without the code. Here every push uploads `output_dir/model`,
    exported anew. With `hub_strategy="checkpoint"` (or `"all_checkpoints"`) the checkpoint goes up too, with the states
    that a resume needs, as that strategy promises.

    Attributes:
        card_variables: what the model card says of the run (see `xlm_hf.hub.render_card`).
    """

    args: Any
    card_variables: dict[str, Any]

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository; raises OSError, one sentence, if the Hub refuses."""
        with hub_errors(self.args.hub_model_id or Path(self.args.output_dir).name):
            super().init_hf_repo(token, private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card_variables: Any,
    ) -> Any:
        """Export the model as it is evaluated, and upload it.

        Args:
            commit_message: of the commit.
            blocking: whether to wait until it is there.
            token: of the Hub; by default that of the arguments.
            revision: the branch; by default that of the arguments.
            private: whether a new repository is private.
            **card_variables: for the model card, over those of the run.

        Raises:
            OSError: one sentence, if the Hub refuses or cannot be reached; the export is kept.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        folder = Path(self.args.output_dir) / "model"
        variables = {**self._card_of_this_step(), **card_variables}
        with self.averaged_weights():  # type: ignore[attr-defined]
            export_model(self.accelerator.unwrap_model(self.model), self.processing_class, folder, variables)
        with hub_errors(str(self.hub_model_id), f"the same command with output_dir={self.args.output_dir} tries again"):
            return self._upload(folder, commit_message, run_as_future=not blocking, token=token, revision=revision)

    def _card_of_this_step(self) -> dict[str, Any]:
        metrics = {name: value for log in self.state.log_history for name, value in log.items() if "/" in name}
        return {
            **self.card_variables,
            "metrics": self.card_variables.get("metrics") or metrics,
            "steps": self.state.global_step,
            "model_id": str(self.hub_model_id),
        }

    def _upload(self, folder: Path, message: str | None, token=None, revision=None, **options: Any) -> Any:
        api = HfApi(token=token or self.args.hub_token)
        revision = revision or self.args.hub_revision
        return _upload(api, str(self.hub_model_id), folder, message, revision=revision, **options)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Export a checkpoint, its averaged weights if it has any, and upload it while training goes on."""
        strategy, checkpoint = self.args.hub_strategy, Path(checkpoint_folder)
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            if not self.args.hub_always_push:
                return
            # What it uploads would change under it.
            self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # `model/` is that of a run that is finished.
        export = checkpoint.with_name("model-in-progress")
        try:
            # From its files, so that no other rank need take part.
            model = AutoModel.from_pretrained(resolve_checkpoint(checkpoint_folder), dtype=torch.float32)
            if self.args.use_ema:
                load_average(model, checkpoint)
            export_model(model, AutoTokenizer.from_pretrained(checkpoint), export, self._card_of_this_step())
        except (OSError, ValueError) as error:
            return _warn_of_failure(self.state.global_step, error)
        folders = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        job = HfApi().run_as_future(
            self._upload_in_background, export, checkpoint, folders.get(strategy), self.state.global_step
        )
        self.push_in_progress: Any = PushInProgress([job])  # type: ignore[arg-type]

    def _upload_in_background(self, export: Path, checkpoint: Path, folder: str | None, step: int) -> None:
        """Upload an export and, if it has a `folder` in the repository, its checkpoint; a failure is a warning."""
        message = f"Training in progress, step {step}"
        try:
            with hub_errors(str(self.hub_model_id), "the next push tries again"):
                self._upload(export, message)
                if folder is not None:
                    self._upload(checkpoint, f"{message}, checkpoint", path_in_repo=folder)
        except OSError as error:
            _warn_of_failure(step, error)
        finally:
            shutil.rmtree(export)
