"""Parses Triton's config.pbtxt, by Triton's own message where a package carries it."""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

_KIND = descriptor_pb2.FieldDescriptorProto
#: the messages and fields that vtexport writes, with the types and numbers of Triton's model_config.proto
_MESSAGES: dict[str, list[tuple[str, int, Any, bool]]] = {
    "Reshape": [("shape", 1, _KIND.TYPE_INT64, True)],
    "Port": [
        ("name", 1, _KIND.TYPE_STRING, False),
        ("data_type", 2, ".DataType", False),
        ("dims", 4, _KIND.TYPE_INT64, True),
        ("reshape", 5, ".Reshape", False),
        ("optional", 8, _KIND.TYPE_BOOL, False),
    ],
    "Group": [("count", 2, _KIND.TYPE_INT32, False), ("kind", 4, ".Kind", False)],
    "Policy": [("decoupled", 1, _KIND.TYPE_BOOL, False)],
    "Batching": [("max_queue_delay_microseconds", 2, _KIND.TYPE_UINT64, False)],
    "Value": [("string_value", 1, _KIND.TYPE_STRING, False)],
    "Parameter": [("key", 1, _KIND.TYPE_STRING, False), ("value", 2, ".Value", False)],
    "ModelConfig": [
        ("name", 1, _KIND.TYPE_STRING, False),
        ("max_batch_size", 4, _KIND.TYPE_INT32, False),
        ("input", 5, ".Port", True),
        ("output", 6, ".Port", True),
        ("instance_group", 7, ".Group", True),
        ("default_model_filename", 8, _KIND.TYPE_STRING, False),
        ("dynamic_batching", 11, ".Batching", False),
        ("parameters", 14, ".Parameter", True),
        ("backend", 17, _KIND.TYPE_STRING, False),
        ("model_transaction_policy", 19, ".Policy", False),
    ],
}
_ENUMS = {
    "DataType": {
        "TYPE_INVALID": 0, "TYPE_BOOL": 1, "TYPE_UINT8": 2, "TYPE_INT8": 6, "TYPE_INT32": 8, "TYPE_INT64": 9,
        "TYPE_FP16": 10, "TYPE_FP32": 11, "TYPE_STRING": 13, "TYPE_BF16": 14,
    },
    "Kind": {"KIND_AUTO": 0, "KIND_GPU": 1, "KIND_CPU": 2},
}  # fmt: skip


def parsed(text: str) -> Any:
    """The message in `text`; enums are numbers.

    Raises:
        google.protobuf.text_format.ParseError: it is none.
    """
    try:
        from tritonclient.grpc.model_config_pb2 import ModelConfig
    except ImportError:
        ModelConfig = _own()
    return text_format.Parse(text, ModelConfig())


def _own() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="own_model_config.proto", syntax="proto3")
    for name, values in _ENUMS.items():
        enum = file.enum_type.add(name=name)
        for value, number in values.items():
            enum.value.add(name=value, number=number)
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind, repeated in fields:
            label = _KIND.LABEL_REPEATED if repeated else _KIND.LABEL_OPTIONAL
            if isinstance(kind, str):
                base = _KIND.TYPE_ENUM if kind[1:] in _ENUMS else _KIND.TYPE_MESSAGE
                message.field.add(name=field, number=number, label=label, type=base, type_name=kind)
            else:
                message.field.add(name=field, number=number, label=label, type=kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("ModelConfig"))


def type_name(number: int) -> str:
    """The name of a data type."""
    return next(name for name, value in _ENUMS["DataType"].items() if value == number)


def kind_name(number: int) -> str:
    """The name of an instance group's kind."""
    return next(name for name, value in _ENUMS["Kind"].items() if value == number)
