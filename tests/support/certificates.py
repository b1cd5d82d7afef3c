"""Certificates for servers that speak TLS."""

from __future__ import annotations

import subprocess
from pathlib import Path


def certificate(folder: Path, name: str, subject_alt_name: str) -> None:
    """Make a CA of that name, and a certificate signed by it."""

    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *key, "-keyout", f"{name}-ca.key", "-out", f"{name}-ca.crt", "-subj", f"/CN={name}")
    openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}-server")
    (folder / f"{name}.ext").write_text(f"subjectAltName={subject_alt_name}\n")
    signing = ("-CA", f"{name}-ca.crt", "-CAkey", f"{name}-ca.key", "-CAcreateserial", "-extfile", f"{name}.ext")
    openssl("x509", "-req", "-in", f"{name}.csr", *signing, "-days", "2", "-out", f"{name}.crt")


def certified(folder: Path, name: str) -> tuple[str, ...]:
    """Settings of a server that has the certificate of that name, and trusts those of the same CA."""
    files = ("--tls-cert-file", f"{folder}/{name}.crt", "--tls-key-file", f"{folder}/{name}.key")
    return (*files, "--tls-ca-cert-file", f"{folder}/{name}-ca.crt", "--tls-auth-clients", "no")
