"""The certificate of all brokers here."""

from __future__ import annotations

from pathlib import Path
from threading import Lock

from broker.installing import fresh
from broker.kind import HOST, STATE
from broker.process import run

_making = Lock()


def certificate() -> Path:
    """A folder with ca.pem, cert.pem and key.pem for 127.0.0.1 and localhost; made once."""
    folder = STATE / "tls"
    with _making:
        if not folder.exists():
            _make(folder)
    return folder


def _make(folder: Path) -> None:
    work, failed = fresh(folder), "No certificate could be made"
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-noenc", "-days", "3650"]
    authority = ["-subj", "/CN=Quintet's brokers", "-addext", "keyUsage=critical,keyCertSign,cRLSign"]
    server = ["-CA", "ca.pem", "-CAkey", "ca.key", "-subj", f"/CN={HOST}"]
    for extension in (f"subjectAltName=IP:{HOST},DNS:localhost", "basicConstraints=critical,CA:FALSE"):
        server += ["-addext", extension]
    pair = ["-in", "cert.pem", "-inkey", "key.pem", "-certfile", "ca.pem", "-passout", "pass:quintet"]
    run([*request, *authority, "-keyout", "ca.key", "-out", "ca.pem"], failed, folder=work)
    run([*request, *server, "-keyout", "key.pem", "-out", "cert.pem"], failed, folder=work)
    run(["openssl", "pkcs12", "-export", *pair, "-out", "key.p12"], failed, folder=work)
    (work / "pair.pem").write_text((work / "key.pem").read_text() + (work / "cert.pem").read_text())
    work.rename(folder)
