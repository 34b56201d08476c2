"""RabbitMQ, with its STOMP and its management pages; Debian's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from broker.certificate import certificate
from broker.installing import debian
from broker.kind import HOST, Broker, ask, stomp


class RabbitMQ(Broker):
    name = "rabbitmq"
    package = "rabbitmq-server"
    needs = ("openssl",)
    ports = ("amqp", "amqps", "stomp", "stomps", "management", "distribution", "epmd")
    # Debian's wrappers in /usr/sbin change the user and lose the environment
    programs = Path("/usr/lib/rabbitmq/bin")

    def version(self) -> str | None:
        return debian("rabbitmq-server") if self.programs.exists() else None

    def prepare(self) -> None:
        tls = certificate()
        self.write("enabled_plugins", "[rabbitmq_management, rabbitmq_stomp].\n")
        settings = {
            "listeners.tcp.1": self.at("amqp"),
            "listeners.ssl.1": self.at("amqps"),
            "ssl_options.cacertfile": tls / "ca.pem",
            "ssl_options.certfile": tls / "cert.pem",
            "ssl_options.keyfile": tls / "key.pem",
            "ssl_options.verify": "verify_none",
            "stomp.listeners.tcp.1": self.at("stomp"),
            "stomp.listeners.ssl.1": self.at("stomps"),
            "management.tcp.ip": HOST,
            "management.tcp.port": self.port("management"),
        }
        self.settings("rabbitmq.conf", settings)

    def commands(self) -> list[list[str]]:
        # Erlang's name server would outlive the broker, and be shared with all others of this machine
        return [["epmd"], [str(self.programs / "rabbitmq-server"), "-noinput"]]

    def environment(self) -> dict[str, str]:
        return self._node() | {
            "ERL_EPMD_ADDRESS": HOST,
            "RABBITMQ_ALLOW_INPUT": "1",  # its script becomes the broker, instead of waiting for it
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_DIST_PORT": str(self.port("distribution")),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_LOG_BASE": str(self.folder),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_PID_FILE": str(self.folder / "rabbitmq.pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }

    def _node(self) -> dict[str, str]:
        """By which rabbitmqctl finds it."""
        return {
            "HOME": str(self.folder),  # of Erlang's cookie
            "ERL_EPMD_PORT": str(self.port("epmd")),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_NODENAME": "quintet@localhost",
        }

    def addresses(self) -> dict[str, Any]:
        return {
            "address": f"amqp://guest:guest@{self.at('amqp')}",
            "tls": f"amqps://guest:guest@{self.at('amqps')}",
            "stomp": f"stomp://guest:guest@{self.at('stomp')}",
            "stomp_tls": f"stomps://guest:guest@{self.at('stomps')}",
            "management": f"http://guest:guest@{self.at('management')}",
            "ca": str(certificate() / "ca.pem"),
            "rabbitmqctl": str(self.programs / "rabbitmqctl"),
            "environment": self._node(),  # to call it with
        }

    def answers(self) -> bool:
        start = ask(self.port("amqp"), b"AMQP\0\0\x09\x01", 11)
        return start[:1] == b"\1" and start[7:] == b"\0\x0a\0\x0a" and stomp(self.port("stomp"), "guest", "/")
