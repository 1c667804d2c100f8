"""`WatermarkTrainer`: Trainer with a mark in what it trains, and evidence in its card.

The task's training is left as it was: the same loss in evaluation, the same checkpoints, the same
resume. Key material enters no file: not the arguments, not the state, not the config.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_watermark.card import updated_card
from hf_watermark.drafts import Drafts
from hf_watermark.embedding import WatermarkLoss
from hf_watermark.errors import (
    AttachError,
    HubError,
    RevisionMissingError,
    WatermarkError,
)
from hf_watermark.evidence import CLAIM_FILE, Claim, Evidence
from hf_watermark.files import FolderFiles
from hf_watermark.hub import HubFiles
from hf_watermark.key import OwnerKey
from hf_watermark.publish import CARD_FILE, read_card_text, write_card, write_file
from hf_watermark.scheme import Scheme
from hf_watermark.softlabels.answers import logits_of
from hf_watermark.softlabels.teacher import Teacher
from hf_watermark.verify import verify_hub_model

if TYPE_CHECKING:
    from hf_watermark.softlabels import SoftLabelWatermark

__all__ = ["WatermarkTrainer"]

logger = logging.getLogger(__name__)


class WatermarkTrainer(Trainer):
    """A Trainer that embeds an ownership mark. It takes every argument of Trainer, and these.

    Args:
        watermark_key: The owner's key.
        watermark_scheme: None takes `Scheme()`: spread by projection, nothing to tune.
        watermark_carriers: Names of the parameters that carry the mark. None chooses. Names given
            here are kept out of the public claim; `claim` holds the owner's copy, to be saved.
        watermark_seal: Whether the end of training adds the mark that disguised copies are read by
            (`WatermarkLoss.seal`). Checkpoints on the way do not have it.
        watermark_teacher: A calibrated `SoftLabelWatermark` around another model. The training loss
            is then the cross-entropy against its soft labels, in place of the task's, so that the
            weights carry that mark too, for `verify_outputs` to find; labels are not needed. It is
            moved to the student's device, otherwise left as it is, and never saved.
        distillation_temperature: Of both sides' soft labels; see `Teacher`.

    Attributes:
        watermark: The `WatermarkLoss` at work.
        claim: The owner's copy of the claim about what was saved last; None before.

    Raises:
        WatermarkError: If the model cannot carry the mark; nothing has been trained then.
    """

    def __init__(
        self,
        *args: Any,
        watermark_key: OwnerKey,
        watermark_scheme: Scheme | None = None,
        watermark_carriers: Sequence[str] | None = None,
        watermark_seal: bool = True,
        watermark_teacher: SoftLabelWatermark | None = None,
        distillation_temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if not isinstance(watermark_key, OwnerKey):
            raise AttachError(
                "watermark_key is no OwnerKey",
                got=type(watermark_key).__name__,
                do="load it: OwnerKey.load('acme.key')",
            )
        self._teacher = (
            None
            if watermark_teacher is None
            else Teacher(watermark_teacher, distillation_temperature)
        )
        super().__init__(*args, **kwargs)
        self._check_loss()
        self._watermark_key = watermark_key
        self._watermark_scheme = watermark_scheme
        self._watermark_carriers = watermark_carriers
        self._watermark_seal = watermark_seal
        self.claim: Claim | None = None
        self._drafts = Drafts()
        self._checkpoint: Path | None = None
        self._push_revision: str | None = None
        self._push_token: str | None = None
        self.watermark = self._new_watermark()
        self.watermark.release()
        self.add_callback(_Marking(self))

    def _new_watermark(self) -> WatermarkLoss:
        return WatermarkLoss(
            cast(nn.Module, self.model),
            self._watermark_key,
            self._watermark_scheme,
            carriers=self._watermark_carriers,
        )

    def _check_loss(self) -> None:
        if self._teacher is None:
            return
        self._teacher.accept(cast(nn.Module, self.model))
        if self.compute_loss_func is not None or self.label_smoother is not None:
            raise AttachError(
                "With a teacher the loss is the cross-entropy against its soft labels",
                got="compute_loss_func or label_smoothing_factor as well",
            )

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    # Training ---------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does, marking on the way."""
        try:
            return super().train(*args, **kwargs)
        finally:
            # Interrupted or not: the next trainer of this model must be able to attach.
            self.watermark.release()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task's or the teacher's; in training, with the mark's term if the scheme has one."""
        result: Any
        if self._teacher is not None and model.training:
            loss, outputs = self._lesson(self._teacher, model, inputs, num_items_in_batch)
            result = (loss, outputs) if return_outputs else loss
        else:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training or self.watermark.scheme.embedding == "projection":
            return result
        penalty = self.watermark.penalty()
        if self._is_scaled(num_items_in_batch):
            # Trainer will not divide this loss by the accumulation steps, so a term that is simply
            # added would reach the optimizer that many times too strong.
            penalty = penalty / self.current_gradient_accumulation_steps
        if not return_outputs:
            return result + penalty.to(result.device)
        loss, outputs = result
        return loss + penalty.to(loss.device), outputs

    def _lesson(
        self,
        teacher: Teacher,
        model: nn.Module,
        inputs: Mapping[str, Any],
        num_items_in_batch: Tensor | int | None,
    ) -> tuple[Tensor, Any]:
        """The loss against the teacher's soft labels, normalised as Trainer does, and outputs."""
        asked = {k: v for k, v in inputs.items() if k not in ("labels", *self.label_names)}
        outputs = model(**asked)
        losses = teacher.losses(logits_of(outputs, labelled=False), inputs["pixel_values"])
        if not self._is_scaled(num_items_in_batch):
            return losses.mean(), outputs
        if num_items_in_batch is None:
            return losses.mean() / self.current_gradient_accumulation_steps, outputs
        loss = losses.sum() / num_items_in_batch
        if self.args.average_tokens_across_devices:  # they were counted in all processes
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return loss, outputs

    def _is_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether Trainer takes the loss as scaled for accumulation already."""
        if self.loss_is_scaled_for_ga is not None:
            return bool(self.loss_is_scaled_for_ga)
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(by_model or self.compute_loss_func is not None)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mark's BER, smallest margin and log10 p beside the training loss."""
        if "loss" in logs:
            # In every process: where carriers are sharded, reading them takes all.
            now = self.watermark.measure()
            logs["watermark_ber"] = now.ber
            logs["watermark_margin"] = now.margin
            logs["watermark_log10_p"] = now.log10_p
        super().log(logs, start_time)

    def _start_marking(self) -> None:
        """Bind to the model as it is now: `model_init` and wrappers may have replaced it."""
        self.watermark.release()
        self.watermark = self._new_watermark()
        self.watermark.steps = self.state.global_step

    def _finish_marking(self) -> None:
        self.watermark.project()
        if self._watermark_seal:
            self.watermark.seal()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.watermark.project()
        super()._save_checkpoint(model, trial)

    # Saving and publishing --------------------------------------------------------------------

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        before = self._card_bytes()
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        self._drafts.note(before, self._card_bytes())
        folder = self._folder if output_dir is None else Path(output_dir)
        try:
            self.claim = self.watermark.claim(folder, state_dict)
        except WatermarkError as error:
            # A model without its claim can be claimed later; a training run cannot be repeated.
            self.claim = None
            (folder / CLAIM_FILE).unlink(missing_ok=True)
            warnings.warn(f"No claim was written to {folder}: {error}", stacklevel=2)
            return
        write_file(folder / CLAIM_FILE, self.claim.public.to_bytes())

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._checkpoint = Path(checkpoint_folder)
        try:
            super()._push_from_checkpoint(checkpoint_folder)
        finally:
            self._checkpoint = None

    def _copy_claim(self) -> None:
        """Put the claim where Trainer copies the checkpoint's weights to, when it does."""
        if self._checkpoint is None:
            return
        (self._folder / CLAIM_FILE).unlink(missing_ok=True)
        if (self._checkpoint / CLAIM_FILE).is_file():
            shutil.copy(self._checkpoint / CLAIM_FILE, self._folder / CLAIM_FILE)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write README.md: Trainer's draft, or the user's own card, with the evidence in it.

        Trainer rewrites an existing card. Here a card that is on the Hub, or else in the output
        folder, is kept as it is, and only the watermark's part of it is replaced. A draft that
        nobody touched since this trainer wrote it makes way for the new one.
        """
        if not self.is_world_process_zero():
            return
        path = self._folder / CARD_FILE
        text = self._users_card()
        super().create_model_card(*args, **kwargs)
        draft = path.read_bytes().decode()
        self._drafts.add(draft)
        text = draft if text is None else text
        if self.claim is not None and (self._folder / CLAIM_FILE).is_file():
            text = updated_card(text, self._local_evidence(), self.claim.public)
        write_file(path, text.encode())

    def _users_card(self) -> str | None:
        """The card on the Hub, else the one in the output folder, that is not our own draft.

        A Hub that fails is an error here: taking the card for missing would replace it. So is a
        repo that is missing, for it was created: the token may not see it.
        """
        cards = [read_card_text(FolderFiles(self._folder))]
        repo = cast("str | None", self.hub_model_id)
        if repo is not None:
            revision = self._push_revision or self.args.hub_revision
            with contextlib.suppress(RevisionMissingError):
                files = HubFiles(repo, revision, self._push_token or self.args.hub_token)
                cards.insert(0, read_card_text(files))
        return self._drafts.first_other(cards)

    def _card_bytes(self) -> bytes | None:
        path = self._folder / CARD_FILE
        return path.read_bytes() if path.is_file() else None

    def _local_evidence(self) -> Evidence:
        evidence = verify_hub_model(self._folder, self._watermark_key, claim=self.claim, read="all")
        name = self.hub_model_id or self._folder.name
        return dataclasses.replace(evidence, repo=name)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Push weights, claim and card in one commit; then read the mark back from the Hub.

        The second commit only adds to the card what could not be known before: the sha that was
        read. With `blocking=False` it is left out.

        Returns:
            What Trainer returns: the commit of the weights.
        """
        self._push_revision, self._push_token = revision, token
        try:
            commit = super().push_to_hub(
                commit_message, blocking, token, revision, private, **kwargs
            )
        finally:
            self._push_revision = self._push_token = None
        if blocking and self.claim is not None and self.is_world_process_zero():
            token = token if token is not None else self.args.hub_token
            self._certify(commit.oid, revision or self.args.hub_revision, token)
        return commit

    def _certify(self, oid: str, revision: str | None, token: str | None) -> None:
        try:
            evidence = verify_hub_model(
                str(self.hub_model_id),
                self._watermark_key,
                # The published claim, so that its first commit is found, if it says what to read.
                claim=self.claim if self.watermark.secret_carriers else None,
                revision=oid,
                token=token,
                read="all",
            )
            if not evidence.found:
                warnings.warn(
                    f"The mark was not found in {self.hub_model_id}: train before pushing",
                    stacklevel=3,
                )
            pushed = HubFiles(evidence.repo, oid, token)
            write_card(pushed, evidence, self.claim, revision=revision, token=token)
            write_card(FolderFiles(self._folder), evidence, self.claim)
        except HubError as error:
            # Weights, claim and card are there; the card only lacks the revision that was read.
            logger.warning(
                "%s was pushed, but not read back: %s; run: "
                "verify_hub_model %s --key FILE --write-card",
                self.hub_model_id,
                error,
                self.hub_model_id,
            )


class _Marking(TrainerCallback):
    """Tells a `WatermarkTrainer` when training starts, steps and ends. Holds no state to export."""

    def __init__(self, trainer: WatermarkTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer._start_marking()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.watermark.step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # What is evaluated is what is saved: the metrics of a checkpoint are its own.
        if control.should_evaluate or control.should_save:
            self._trainer.watermark.project()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_step_end(args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer._finish_marking()

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer._copy_claim()
