"""Reads TensorBoard's event files by their specification alone: TFRecord, CRC-32C and `event.proto`."""

import collections
import pathlib
import struct
from collections.abc import Iterator
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_TYPES = {"double": 1, "float": 2, "int64": 3, "string": 9, "message": 11, "enum": 5}


def _messages() -> Any:
    """The fields of tensorboard/compat/proto/{event,summary}.proto that scalars need."""
    file = descriptor_pb2.FileDescriptorProto(name="events_for_tests.proto", package="t", syntax="proto3")
    fields = {
        "Value": [("tag", 1, "string", ""), ("simple_value", 2, "float", "")],
        "Summary": [("value", 1, "message", "Value")],
        "SessionLog": [("status", 1, "int64", "")],
        "Event": [
            ("wall_time", 1, "double", ""),
            ("step", 2, "int64", ""),
            ("file_version", 3, "string", ""),
            ("summary", 5, "message", "Summary"),
            ("session_log", 7, "message", "SessionLog"),
        ],
    }
    for name, members in fields.items():
        message = file.message_type.add(name=name)
        for field, number, kind, of in members:
            added = message.field.add(name=field, number=number, type=_TYPES[kind], label=1)
            if of:
                added.type_name = f".t.{of}"
                added.label = 3 if field == "value" else 1
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Event"))


def _masked_crc(data: bytes) -> int:
    """CRC-32C (Castagnoli), bit by bit, masked as in TFRecord."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _records(data: bytes) -> Iterator[bytes]:
    while data:
        length, crc = struct.unpack("<QI", data[:12])
        assert crc == _masked_crc(data[:8])
        body, (crc,) = data[12 : 12 + length], struct.unpack("<I", data[12 + length : 16 + length])
        assert crc == _masked_crc(body)
        yield body
        data = data[16 + length :]


def scalars(directory: pathlib.Path) -> dict[str, dict[int, float]]:
    """By tag and step, what TensorBoard would show of a directory."""
    found: dict[str, dict[int, float]] = collections.defaultdict(dict)
    event_type = _messages()
    for path in sorted(directory.glob("events.out.tfevents.*")):
        for body in _records(path.read_bytes()):
            event = event_type.FromString(body)
            if event.session_log.status == 1:
                # A restart: what was written of this step and later ones is void.
                for steps in found.values():
                    for step in [step for step in steps if step >= event.step]:
                        del steps[step]
            for value in event.summary.value:
                found[value.tag][event.step] = value.simple_value
    return dict(found)
