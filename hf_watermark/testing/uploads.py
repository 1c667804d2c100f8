"""Large files: the LFS batch call, the upload to the second origin, the verification."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets

from starlette.responses import JSONResponse, Response

from hf_watermark.testing.call import Call
from hf_watermark.testing.refusal import Refusal
from hf_watermark.testing.store import Repo

__all__ = ["lfs_batch", "lfs_verify", "receive_blob", "upload_mode"]

_LFS_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".parquet",
    ".arrow",
    ".pt",
    ".pth",
    ".onnx",
    ".h5",
    ".zip",
    ".gz",
    ".npy",
    ".npz",
    ".msgpack",
    ".pkl",
)
_LFS_SIZE = 10_000_000


def upload_mode(path: str, size: int, sample: bytes) -> str:
    """`lfs` or `regular`, decided by name, size and whether the sample is text."""
    if path.endswith(_LFS_SUFFIXES) or size > _LFS_SIZE:
        return "lfs"
    try:
        # The sample may end inside a character.
        sample[: len(sample) if len(sample) < 512 else -4].decode()
    except UnicodeDecodeError:
        return "lfs"
    return "lfs" if b"\0" in sample else "regular"


def _named(item: object) -> tuple[str, int]:
    """The digest and the size of an LFS object."""
    oid, size = (item.get("oid"), item.get("size")) if isinstance(item, dict) else (None, None)
    if not isinstance(oid, str) or not isinstance(size, int) or size < 0:
        raise Refusal.bad_request(f"Not an LFS object: {item!r}")
    return oid, size


def _has(repo: Repo, oid: str, size: int) -> bool:
    path = repo.blob_path(oid)
    return path.exists() and path.stat().st_size == size


async def lfs_batch(call: Call) -> Response:
    """POST R.git/info/lfs/objects/batch, for uploads."""
    _, body = call.signed_in, await call.json()
    if body.get("operation") != "upload":
        raise Refusal.bad_request("The loopback Hub's LFS endpoint takes uploads only")
    repo, objects = call.repo, []
    for item in body.get("objects", []):
        oid, size = _named(item)
        answer: dict[str, object] = {"oid": oid, "size": size}
        if not _has(repo, oid, size):
            path = f"/lfs/{repo.type}s/{repo.id}/{oid}/{size}"
            verify = f"{call.site.endpoint}{repo.url_path}.git/info/lfs/objects/verify"
            actions = {"upload": {"href": call.site.sign("PUT", path)}, "verify": {"href": verify}}
            answer |= {"authenticated": True, "actions": actions}
        objects.append(answer)
    return JSONResponse(
        {"transfer": "basic", "objects": objects}, media_type="application/vnd.git-lfs+json"
    )


async def receive_blob(call: Call) -> Response:
    """PUT on the second origin: stream to disk, keep only what has the promised digest."""
    raw_path = call.request.scope["raw_path"].decode("ascii")
    call.site.check_signature("PUT", raw_path, call.request.query_params.get("signature", ""))
    repo_type, namespace, name, oid, size = call.args
    repo = call.site.store.find(repo_type[:-1], f"{namespace}/{name}")
    if repo is None:
        raise Refusal(404, "NoSuchKey")
    temporary = call.site.store.uploads / secrets.token_hex(8)
    digest, received = hashlib.sha256(), 0
    try:
        with temporary.open("wb") as file:
            pending = bytearray()
            async for chunk in call.request.stream():
                received += len(chunk)
                pending += chunk
                # Hashed and written off the loop (both let go of the GIL), a few MiB at a time.
                if len(pending) >= 4 << 20 or not chunk:
                    block, pending = bytes(pending), bytearray()
                    await asyncio.to_thread(_consume, digest, file, block)
        if digest.hexdigest() != oid or received != int(size):
            raise Refusal.bad_request(
                f"Digest mismatch: expected {oid} of {size} bytes, "
                f"got {digest.hexdigest()} of {received} bytes"
            )
        os.replace(temporary, repo.blob_path(oid))
    finally:
        temporary.unlink(missing_ok=True)
    return Response(status_code=200, headers={"ETag": f'"{oid}"'})


def _consume(digest: hashlib._Hash, file: object, block: bytes) -> None:
    digest.update(block)
    file.write(block)  # type: ignore[attr-defined]


async def lfs_verify(call: Call) -> Response:
    """POST the verify action's URL."""
    body = await call.json()
    oid, size = _named(body)
    if not _has(call.repo, oid, size):
        raise Refusal(404, f"LFS object not found: {oid}")
    return JSONResponse({"success": True})
