"""Shards for the damage campaign: tars no tool of ours would write, token shards with what their index agrees with.

Contract: writes below the folders it is given; documents are sentences of tests/support/tiny_data.py.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np

from minillm.data.token_shards import chunk_stride
from minillm.utils.files import read_json, sha256_file, write_json

Members = list[tuple[str, bytes]]


def documents(texts: list[str]) -> Members:
    return [(f"{number:04d}.json", json.dumps({"text": text}).encode()) for number, text in enumerate(texts)]


def tar_of(members: Members, format: int = tarfile.USTAR_FORMAT) -> bytes:
    """An uncompressed tar of regular files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zip_of(members: Members) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return out.getvalue()


def gzipped(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def with_size(tar: bytes, field: bytes) -> bytes:
    """The first member's header with other bytes for its size, and a checksum that fits them."""
    header = bytearray(tar[:512])
    header[124:136] = field.ljust(12, b"\0")[:12]
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + tar[512:]


def with_pax(tar: bytes, record: bytes) -> bytes:
    """The tar after a pax header that holds `record`."""
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    return info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(-(-len(record) // 512) * 512, b"\0") + tar


def pax_record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n"
    length = len(body) + len(str(len(body)))
    length = len(body) + len(str(length))
    return f"{length}{body}".encode()


def with_special_members(members: Members, outside: Path) -> bytes:
    """Links out of the folder, devices, a pipe and folders between the members."""
    out = io.BytesIO()
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
    with tarfile.open(fileobj=out, mode="w") as tar:
        for number, (name, content) in enumerate(members):
            special = tarfile.TarInfo(f"../special-{number}.json")
            special.type = kinds[number % len(kinds)]
            special.linkname = str(outside) if special.type in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            tar.addfile(special)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def change_index(folder: Path, change) -> None:
    index = read_json(folder / "index.json")
    write_json(folder / "index.json", change(index) or index)


def change_tokens(folder: Path, change, shard: int = 0) -> None:
    """Change a token shard's arrays in place ({"tokens": [chunks, C], "borders": [n]}), with every checksum fitting."""
    index = read_json(folder / "index.json")
    entry = index["shards"][shard]
    path = folder / entry["name"]
    content = bytearray(path.read_bytes())
    dtype = np.dtype(index["dtype"])
    stride = chunk_stride(index["chunk_tokens"], dtype.itemsize, False)
    num_chunks = -(-entry["num_tokens"] // index["chunk_tokens"])
    first = 512 + 128
    tokens = np.ndarray((num_chunks, index["chunk_tokens"]), dtype, content, first, (stride, dtype.itemsize))
    tail = num_chunks * stride
    borders = np.ndarray(entry["num_documents"], np.uint32, content, tail + first)
    tail += 512 + -(-(128 + borders.nbytes) // 512) * 512
    checksums = np.ndarray(num_chunks, np.uint32, content, tail + first)
    change({"tokens": tokens, "borders": borders})
    for number in range(num_chunks):
        checksums[number] = zlib.crc32(tokens[number].tobytes())
    entry["tail_crc32"] = zlib.crc32(checksums.data, zlib.crc32(borders.data))
    path.write_bytes(content)
    entry["sha256"] = sha256_file(path)
    write_json(folder / "index.json", index)


def base256(size: int) -> bytes:
    return struct.pack(">B", 0x80) + size.to_bytes(11, "big")
