"""ActiveMQ; Debian's."""

from __future__ import annotations

import shutil
from pathlib import Path
from string import Template
from typing import Any

from broker.certificate import certificate
from broker.installing import debian
from broker.kind import Broker, stomp


class ActiveMQ(Broker):
    name = "activemq"
    package = "activemq"
    needs = ("java", "openssl")
    ports = ("stomp", "stomps", "openwire")
    home = Path("/usr/share/activemq")

    def version(self) -> str | None:
        return debian("activemq") if self.home.exists() and shutil.which("java") else None

    def prepare(self) -> None:
        (self.folder / "tmp").mkdir(exist_ok=True)
        log = {  # without it, it logs nothing
            "log4j.rootLogger": "INFO, out",
            "log4j.appender.out": "org.apache.log4j.ConsoleAppender",
            "log4j.appender.out.layout": "org.apache.log4j.PatternLayout",
            "log4j.appender.out.layout.ConversionPattern": "%d %-5p %c{1}: %m%n",
        }
        self.settings("log4j.properties", log)
        connectors = "".join(
            f'<transportConnector name="{name}" uri="{scheme}://{self.at(name)}'
            '?wireFormat.maxFrameSize=104857600&amp;maximumConnections=1000"/>'
            for name, scheme in {"stomp": "stomp", "stomps": "stomp+ssl", "openwire": "tcp"}.items()
        )
        template = Template(Path(__file__).with_suffix(".xml").read_text())
        text = template.substitute(data=self.folder / "data", tls=certificate(), connectors=connectors)
        self.write("activemq.xml", text)

    def commands(self) -> list[list[str]]:
        settings = {
            "activemq.home": self.home,
            "activemq.base": self.folder,
            "activemq.conf": self.folder,
            "activemq.data": self.folder / "data",
            "java.io.tmpdir": self.folder / "tmp",
            "java.util.prefs.userRoot": self.folder / "tmp",
            "log4j.configuration": f"file:{self.folder}/log4j.properties",
        }
        options = [f"-D{key}={value}" for key, value in settings.items()]
        jar = str(self.home / "bin" / "activemq.jar")
        return [["java", "-Xmx256m", *options, "-jar", jar, "start", f"xbean:file:{self.folder}/activemq.xml"]]

    def addresses(self) -> dict[str, Any]:
        return {
            "address": f"stomp://quintet:quintet@{self.at('stomp')}",  # without a user it answers as well
            "tls": f"stomps://quintet:quintet@{self.at('stomps')}",
            "openwire": f"tcp://{self.at('openwire')}",
            "ca": str(certificate() / "ca.pem"),
        }

    def answers(self) -> bool:
        return stomp(self.port("stomp"), "quintet", "localhost")
