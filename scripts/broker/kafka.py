"""Kafka in KRaft mode, one node; from Maven's repository."""

from __future__ import annotations

import shutil
from typing import Any

from broker.certificate import certificate
from broker.installing import fresh
from broker.kind import SOFTWARE, Broker, ask
from broker.process import run

RELEASE = "4.1.1"
WANTED = {
    "org.apache.kafka:kafka_2.13": RELEASE,
    "org.apache.logging.log4j:log4j-slf4j-impl": "2.24.3",  # of the log4j that it brings; without it, it logs nothing
}


SCRAM = ("SCRAM-SHA-256", "SCRAM-SHA-512")


class Kafka(Broker):
    name = "kafka"
    needs = ("java", "mvn", "openssl")
    ports = ("plain", "sasl", "tls", "controller", "proxy", "proxied")
    jars = SOFTWARE / f"kafka-{RELEASE}"

    def version(self) -> str | None:
        return RELEASE if self.jars.exists() and shutil.which("java") else None

    def fetch(self) -> None:
        work = fresh(self.jars)
        dependencies = "".join(
            f"<dependency><groupId>{group}</groupId><artifactId>{artifact}</artifactId><version>{version}</version></dependency>"
            for (group, artifact), version in ((key.split(":"), version) for key, version in WANTED.items())
        )
        (work / "pom.xml").write_text(
            '<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>'
            "<groupId>quintet</groupId><artifactId>brokers</artifactId><version>1</version>"
            f"<dependencies>{dependencies}</dependencies></project>"
        )
        copy = ["dependency:copy-dependencies", f"-DoutputDirectory={work}"]
        run(["mvn", "--quiet", "--batch-mode", "--file", str(work / "pom.xml"), *copy], "Kafka could not be fetched")
        work.rename(self.jars)

    def prepare(self) -> None:
        (self.folder / "tmp").mkdir(exist_ok=True)
        log = {
            "appender.out.type": "Console",
            "appender.out.name": "out",
            "appender.out.layout.type": "PatternLayout",
            "appender.out.layout.pattern": "%d %-5p %c{1}: %m%n",
            "rootLogger.level": "INFO",
            "rootLogger.appenderRef.out.ref": "out",
        }
        self.settings("log4j2.properties", log)
        config = self.settings("server.properties", self._server())
        if not (self.folder / "data" / "meta.properties").exists():
            cluster = "cXVpbnRldC1icm9rZXJzMQ"  # any 16 bytes in base64
            users = [word for name in SCRAM for word in ("-S", f"{name}=[name=quintet,password=quintet]")]
            tool = self._java("kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(config))
            run([*tool, *users], "Kafka's folder could not be laid out")

    def _server(self) -> dict[str, object]:
        security = "org.apache.kafka.common.security"
        outside = f"PLAIN://{self.at('plain')},SASL://{self.at('sasl')},TLS://{self.at('tls')}"
        return {
            "process.roles": "broker,controller",
            "node.id": 1,
            "controller.quorum.voters": f"1@{self.at('controller')}",
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "PLAIN",
            "listeners": f"{outside},PROXIED://{self.at('proxied')},CONTROLLER://{self.at('controller')}",
            # a client that comes through a proxy must be told the proxy's address, or it goes on without it
            "advertised.listeners": f"{outside},PROXIED://{self.at('proxy')}",
            "listener.security.protocol.map": "PLAIN:PLAINTEXT,SASL:SASL_PLAINTEXT,TLS:SSL,PROXIED:PLAINTEXT,"
            "CONTROLLER:PLAINTEXT",
            "listener.name.sasl.sasl.enabled.mechanisms": ",".join(("PLAIN", *SCRAM)),
            "listener.name.sasl.plain.sasl.jaas.config": f"{security}.plain.PlainLoginModule required"
            ' user_quintet="quintet";',
            **{
                f"listener.name.sasl.{name.lower()}.sasl.jaas.config": f"{security}.scram.ScramLoginModule required;"
                for name in SCRAM
            },
            "listener.name.tls.ssl.keystore.type": "PEM",
            "listener.name.tls.ssl.keystore.location": certificate() / "pair.pem",
            "log.dirs": self.folder / "data",
            "auto.create.topics.enable": "true",
            "group.initial.rebalance.delay.ms": 0,
            # a broker that was killed may not register again until its last session is over
            "broker.heartbeat.interval.ms": 500,
            "broker.session.timeout.ms": 2000,
            "message.max.bytes": 5242880,
            "replica.fetch.max.bytes": 5242880,
            "offsets.topic.num.partitions": 5,
            "offsets.topic.replication.factor": 1,
            "transaction.state.log.num.partitions": 5,
            "transaction.state.log.replication.factor": 1,
            "transaction.state.log.min.isr": 1,
            "share.coordinator.state.topic.num.partitions": 5,
            "share.coordinator.state.topic.replication.factor": 1,
            "share.coordinator.state.topic.min.isr": 1,
        }

    def commands(self) -> list[list[str]]:
        return [self._java("kafka.Kafka", str(self.folder / "server.properties"))]

    def _java(self, *words: str) -> list[str]:
        options = ["-Xms128m", "-Xmx512m", f"-Djava.io.tmpdir={self.folder / 'tmp'}"]
        options.append(f"-Dlog4j2.configurationFile={self.folder}/log4j2.properties")
        return ["java", *options, "-cp", f"{self.jars}/*", *words]

    def addresses(self) -> dict[str, Any]:
        return {
            "address": f"kafka://{self.at('plain')}",
            "sasl": f"kafka://quintet:quintet@{self.at('sasl')}",  # also by SCRAM; without TLS
            "tls": f"kafka://{self.at('tls')}",
            "proxied": {"listen": self.at("proxy"), "to": self.at("proxied")},
            "ca": str(certificate() / "ca.pem"),
        }

    def answers(self) -> bool:
        # Metadata, version 1, of no topic: it knows of a broker when it has found itself
        request = b"\0\3\0\1\0\0\0\7\xff\xff\0\0\0\0"
        reply = ask(self.port("plain"), len(request).to_bytes(4, "big") + request, 12)
        return reply[4:8] == b"\0\0\0\7" and reply[8:12] != b"\0\0\0\0"
