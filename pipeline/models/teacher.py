"""The teacher as a function from raw input to logits."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.contracts.columns import InputSpec
from pipeline.errors import ModelError
from pipeline.models.classifier import build_classifier
from pipeline.models.params import ModelParams, PoolParams, TeacherParams
from pipeline.models.weights import fingerprint_state, load_teacher_weights

__all__ = ["PoolParams", "Teacher", "TeacherParams"]


class Teacher:
    """A trained classifier in evaluation mode, free of Ray.

    Always runs full blocks of ``batch_size`` rows, since the last bits of a row's logits depend on the shape
    of the batch that it is computed in. On a GPU it runs in bf16 (unless told otherwise) and channels-last.

    Args:
        params: a model's parameters with weights; those of a teacher (``TeacherParams``) where it has any.
        spec: the input and the classes of the data.
        batch_size: rows of one forward pass.
        device: none: the GPU if there is one.

    Raises:
        CheckpointError: no weights, or not those of this model.
        ModelError: the network cannot be built.

    Attributes:
        fingerprint: of the weights.
        rows_forwarded: rows that were asked for so far, padding not counted.
    """

    def __init__(
        self, params: ModelParams, spec: InputSpec, batch_size: int, device: torch.device | None = None
    ) -> None:
        settings = params if isinstance(params, TeacherParams) else TeacherParams()
        classifier = build_classifier(params, spec)
        load_teacher_weights(classifier, params)
        self.fingerprint = fingerprint_state(classifier.network.state_dict())
        self.rows_forwarded = 0

        self._spec = spec
        self._device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        on_gpu = self._device.type == "cuda"
        # Autocast rather than bf16 weights: normalisation layers keep their statistics in fp32.
        self._autocast = settings.precision == "bf16" or (settings.precision == "auto" and on_gpu)
        self._network = classifier.eval().requires_grad_(False).to(self._device)
        if on_gpu and spec.kind == "image":
            self._network.to(memory_format=torch.channels_last)
        if settings.compile:
            self._network.compile(dynamic=False)
        # One buffer for every block: it holds the padding, and is writable, contiguous and pinned whatever comes in.
        dtype = torch.uint8 if spec.kind == "image" else torch.float32
        self._block = torch.empty((batch_size, *spec.shape), dtype=dtype, pin_memory=on_gpu)

    def __call__(self, inputs: NDArray[np.generic]) -> NDArray[np.float32]:
        """Logits, float32 (B, C), of uint8 pixels (B, channels, height, width) or float32 features (B, F).

        Raises:
            ModelError: the input has another shape or type, or logits are not finite or of the wrong shape.
        """
        block = self._block.numpy()
        if inputs.shape[1:] != block.shape[1:] or inputs.dtype != block.dtype:
            raise ModelError(
                f"the teacher got {inputs.dtype} input of shape {inputs.shape}, expected {block.dtype} of shape "
                f"(rows, {', '.join(map(str, block.shape[1:]))}): the data differs from what it was built for."
            )
        logits = np.empty((len(inputs), self._spec.num_classes), dtype=np.float32)
        for start in range(0, len(inputs), len(block)):
            rows = inputs[start : start + len(block)]
            block[: len(rows)] = rows
            block[len(rows) :] = rows[-1]
            logits[start : start + len(rows)] = self._forward()[: len(rows)]
        num_bad = int((~np.isfinite(logits)).any(axis=1).sum())
        if num_bad:
            raise ModelError(
                f"the teacher's logits are not finite in {num_bad} of {len(logits)} rows: "
                "check its weights and the data, or use teacher.precision=fp32."
            )
        self.rows_forwarded += len(inputs)
        return logits

    @torch.inference_mode()
    def _forward(self) -> NDArray[np.float32]:
        """Logits of the block buffer; waits for the device, so that the buffer can be filled again."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            logits = self._network(self._block.to(self._device, non_blocking=True))
        expected = (len(self._block), self._spec.num_classes)
        if logits.shape != expected:
            raise ModelError(
                f"the teacher returned logits of shape {tuple(logits.shape)}, expected {expected} (rows, classes): "
                "its network must return one row of logits per row of input."
            )
        result: NDArray[np.float32] = logits.float().cpu().numpy()
        return result
