"""NSQ, with its lookup daemon; built from its source by Go."""

from __future__ import annotations

from typing import Any

from broker.certificate import certificate
from broker.installing import fresh
from broker.kind import HOST, SOFTWARE, Broker, ask
from broker.process import run

RELEASE = "1.3.0"
PROGRAMS = ("nsqd", "nsqlookupd", "to_nsq", "nsq_tail")
# a module of our own, since NSQ's says `replace`, and `go install PROGRAM@VERSION` refuses that
MODULE = f"""\
module brokers
require github.com/nsqio/nsq v{RELEASE}
replace github.com/judwhite/go-svc => github.com/mreiferson/go-svc v1.2.2-0.20210815184239-7a96e00010f6
"""


class NSQ(Broker):
    name = "nsq"
    needs = ("go", "openssl")
    ports = ("tcp", "http", "https", "lookup_tcp", "lookup_http")  # clients guess that HTTP is one above TCP
    bin = SOFTWARE / f"nsq-{RELEASE}"

    def version(self) -> str | None:
        return RELEASE if self.bin.exists() else None

    def fetch(self) -> None:
        work = fresh(self.bin)
        (work / "go.mod").write_text(MODULE)
        programs = [f"github.com/nsqio/nsq/apps/{program}" for program in PROGRAMS]
        environment = {"GOBIN": str(work), "GOFLAGS": "-mod=mod"}
        run(["go", "install", *programs], "NSQ could not be built", environment, folder=work)
        work.rename(self.bin)

    def prepare(self) -> None:
        (self.folder / "data").mkdir(exist_ok=True)

    def commands(self) -> list[list[str]]:
        tls = certificate()
        lookup = {
            "tcp-address": self.at("lookup_tcp"),
            "http-address": self.at("lookup_http"),
            "broadcast-address": HOST,
        }
        daemon = {
            "tcp-address": self.at("tcp"),
            "http-address": self.at("http"),
            "https-address": self.at("https"),  # with a certificate it serves that too, at all interfaces unless told
            "broadcast-address": HOST,
            "lookupd-tcp-address": self.at("lookup_tcp"),
            "data-path": self.folder / "data",
            # What waits in memory only is lost by kill -9, and so is all of a new topic until the first sync: 2 s by
            # default. What is in flight or delayed is lost all the same, once its queue has been synced.
            "mem-queue-size": 0,
            "sync-timeout": "100ms",
            "max-msg-size": 8388608,
            "max-body-size": 16777216,
            "tls-cert": tls / "cert.pem",
            "tls-key": tls / "key.pem",
        }
        return [
            [str(self.bin / program), *(f"--{key}={value}" for key, value in options.items())]
            for program, options in (("nsqlookupd", lookup), ("nsqd", daemon))
        ]

    def addresses(self) -> dict[str, Any]:
        return {
            "address": f"nsq://{self.at('tcp')}",
            "tls": f"nsq://{self.at('tcp')}",  # the same port: it is asked for in IDENTIFY
            "http": f"http://{self.at('http')}",
            "lookup": f"nsq+lookup://{self.at('lookup_http')}",
            "lookup_tcp": self.at("lookup_tcp"),
            "ca": str(certificate() / "ca.pem"),
            "programs": str(self.bin),
        }

    def answers(self) -> bool:
        identified = ask(self.port("tcp"), b"  V2IDENTIFY\n\0\0\0\x02{}", 10) == b"\0\0\0\6\0\0\0\0OK"
        return identified and b" 200 " in ask(self.port("lookup_http"), b"GET /ping HTTP/1.0\r\n\r\n", 15)
