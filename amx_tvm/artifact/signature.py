"""Detached signatures: manifest.sig holds an Ed25519 signature over the manifest's digest.

The manifest names every other file with its SHA-256, so a signature over its digest is one over the
whole artifact; it is worth something only where those are compared (verify "full"). Keys are PEM
files, as OpenSSL makes them::

    openssl genpkey -algorithm ed25519 -out key.pem
    openssl pkey -in key.pem -pubout -out key.pub

The package cryptography is imported only when a key is used.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from amx_tvm.errors import ArtifactError
from amx_tvm.strict_json import read_bytes

FILE_NAME = "manifest.sig"
_CONTEXT = b"amx-tvm artifact\0"  # so that the key's other signatures are none of an artifact
_BYTES = 64


def private_key(path: str | os.PathLike[str] | None, linked: bool = True) -> Any:
    """Read the private key that an artifact is to be signed with.

    Parameters
    ----------
    path : path-like or None
        None: nothing is signed, and there is no key.
    linked : bool
        Whether the artifact has its library. ``link.py`` writes it into the manifest elsewhere, so
        a signature from here would be one of another manifest.

    Raises
    ------
    ArtifactError
        For a file that is no Ed25519 key in PEM, and for an artifact that is not linked.
    """
    if path is None:
        return None
    if not linked:
        raise ArtifactError(
            "what is linked elsewhere cannot be signed here: its manifest changes there; export "
            "without --no-link, or without --sign"
        )
    serialization, kind = _library("Ed25519PrivateKey")
    data = _read(path)
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError) as error:
        raise ArtifactError(
            f"{path} is no private key in PEM without a password: {error}"
        ) from None
    if not isinstance(key, kind):
        raise ArtifactError(f"{path} is no Ed25519 key; `openssl genpkey -algorithm ed25519`")
    return key


def public_key(path: str | os.PathLike[str]) -> Any:
    """Read a public key; ArtifactError for anything else."""
    serialization, kind = _library("Ed25519PublicKey")
    data = _read(path)
    try:
        key = serialization.load_pem_public_key(data)
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path} is no public key in PEM: {error}") from None
    if not isinstance(key, kind):
        raise ArtifactError(f"{path} is no Ed25519 key; `openssl pkey -in KEY -pubout`")
    return key


def sign(directory: Path, digest: str, key: Any) -> None:
    """Write the signature of an artifact.

    Parameters
    ----------
    directory : Path
        With a manifest.
    digest : str
        The manifest's, SHA-256 as hexadecimal text.
    key : private key
        As :func:`private_key` returns it.
    """
    (directory / FILE_NAME).write_bytes(key.sign(_CONTEXT + bytes.fromhex(digest)))


def check(directory: Path, digest: str, path: str | os.PathLike[str]) -> None:
    """Refuse an artifact that the owner of a key has not signed.

    Parameters
    ----------
    directory : Path
        The artifact.
    digest : str
        Its manifest's, SHA-256 as hexadecimal text, compared with the content before.
    path : path-like
        The public key.

    Raises
    ------
    ArtifactError
        Without a signature, or with one of another key or another manifest.
    """
    from importlib import import_module

    key, file = public_key(path), directory / FILE_NAME
    try:
        signature = read_bytes(file, ArtifactError, _BYTES)
    except FileNotFoundError:
        raise ArtifactError(
            f"{directory} has no {FILE_NAME}, and a signature by {path} is required"
        ) from None
    try:
        key.verify(signature, _CONTEXT + bytes.fromhex(digest))
    except import_module("cryptography.exceptions").InvalidSignature:
        raise ArtifactError(
            f"{file} is no signature by {path} over this manifest: it was made with another key or "
            "for another artifact"
        ) from None


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        return read_bytes(path, ArtifactError, 1 << 16)
    except FileNotFoundError:
        raise ArtifactError(f"the key {os.fspath(path)} does not exist") from None


def _library(kind: str) -> tuple[Any, Any]:
    from importlib import import_module

    try:
        primitives = "cryptography.hazmat.primitives"
        ed25519 = import_module(f"{primitives}.asymmetric.ed25519")
        return import_module(f"{primitives}.serialization"), getattr(ed25519, kind)
    except ImportError as error:
        raise ArtifactError(
            f"signatures need the package cryptography, which cannot be imported ({error}); "
            "install it: pip install 'amx-tvm[sign]'"
        ) from None
