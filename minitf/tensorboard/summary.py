"""TensorBoard records: the maps of one sentence at one step, for the Attention tab, and pictures."""

import gzip
import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from minitf.tensorboard import PLUGIN_NAME

FORMAT_VERSION = 1
SCORES_TAG = f"{PLUGIN_NAME}/scores"


def sentence_tag(text: str) -> str:
    """The tag of a sentence's maps: a hash, as TensorBoard does not take tags of any length and script."""
    return f"{PLUGIN_NAME}/{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:16]}"


def attention_summary(text: str, viewer_json: str) -> Any:
    """A Summary of `viewer_json`, an `AttentionMaps.to_viewer()` as JSON, compressed for disk and network."""
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_BLOB_SEQUENCE, Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    content = json.dumps({"version": FORMAT_VERSION})
    metadata = SummaryMetadata(
        plugin_data=SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME, content=content.encode()),
        display_name=text.encode("utf-8", "replace").decode(),
        data_class=DATA_CLASS_BLOB_SEQUENCE,  # both data loaders silently drop a record without a class
    )
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    blob = gzip.compress(viewer_json.encode(), compresslevel=1)
    tensor = TensorProto(dtype=DT_STRING, tensor_shape=shape, string_val=[blob])
    return Summary(value=[Summary.Value(tag=sentence_tag(text), metadata=metadata, tensor=tensor)])


def heads_tag(name: str) -> str:
    """The tag of numbers for each head; a hash, as `sentence_tag`."""
    return f"{PLUGIN_NAME}/heads/{hashlib.sha256(name.encode('utf-8', 'replace')).hexdigest()[:16]}"


def heads_summary(tag: str, values: Mapping[str, Sequence[Sequence[float]]]) -> Any:
    """A Summary of numbers for each head, by name a matrix [layer][head], as one tensor (names, layers, heads)."""
    import numpy as np
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
    from tensorboard.util.tensor_util import make_tensor_proto

    content = json.dumps({"version": FORMAT_VERSION, "names": list(values)})
    metadata = SummaryMetadata(
        plugin_data=SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME, content=content.encode()),
        data_class=DATA_CLASS_TENSOR,
    )
    tensor = make_tensor_proto(np.array(list(values.values()), dtype=np.float32))
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])


def hyperparameter_summaries(settings: Mapping[str, Any], metrics: Mapping[str, str]) -> tuple[Any, ...]:
    """Summaries of a run's settings for the HParams tab; `metrics`: the scalars it is compared by -> their folder."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams

    # TensorBoard shows every number with four decimals, also true as 1.0000: whole numbers and flags go as text.
    shown = {key: str(value).lower() if isinstance(value, int) else value for key, value in settings.items()}
    experiment, start, end = hparams(shown, dict.fromkeys(metrics, 0.0))  # type: ignore[no-untyped-call]
    plugin_data = experiment.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(plugin_data.content)
    for metric in data.experiment.metric_infos:
        metric.name.group = metrics[metric.name.tag]
        metric.display_name = metric.name.tag.rpartition("/")[2]
    plugin_data.content = data.SerializeToString()
    return experiment, start, end


def picture_summary(tag: str, png: bytes) -> Any:
    """A Summary of an image encoded as PNG."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    width, height = struct.unpack(">II", png[16:24])  # the header of every PNG
    image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
    return Summary(value=[Summary.Value(tag=tag, image=image)])
