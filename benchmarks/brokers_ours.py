"""Our own sides of the measurements beside brokers, the same for each: the whole stack, and a transport alone."""

# mypy: disable-error-code="empty-body"
from __future__ import annotations

from benchmarks.brokers import ALONE, MANY, OURS, PATIENCE, At, Call, Heard, Peers, Sample, Stay, decode, encode, sample
from quintet import Bulkhead, Contract, Policy, Service, connect, notification, request, serve
from quintet.message import Channel, Message, new_id
from quintet.replies import Replies
from quintet.transport import DONE, Transport, Verdict, open_address

PATIENT = Policy(timeout=PATIENCE)  # the peers wait for ever: a broker that is still cold must not end the measurement


class Ask(Contract, name="bench-ask"):
    @request
    async def echo(self, sample: Sample) -> Sample: ...


class Tell(Contract, name="bench-tell"):
    @notification
    async def note(self, sample: Sample) -> None: ...


async def answer_quintet(at: At, _: Heard, stay: Stay) -> None:
    service = Service(Ask, concurrency=MANY, policy=Policy(bulkhead=Bulkhead(MANY)))

    @service.handles(Ask.echo)
    async def echo(sample: Sample) -> Sample:
        return sample

    await stay.enter_async_context(serve(service, at=[at.address]))


async def ask_quintet(at: At, stay: Stay) -> Call:
    client = await stay.enter_async_context(connect(Ask, at.address, policy=PATIENT))
    return lambda: client.echo(sample())


async def hear_quintet(at: At, heard: Heard, stay: Stay) -> None:
    service = Service(Tell, concurrency=MANY)

    @service.handles(Tell.note)
    async def note(sample: Sample) -> None:
        heard(sample)

    await stay.enter_async_context(serve(service, at=[at.address]))


async def tell_quintet(at: At, stay: Stay) -> Call:
    client = await stay.enter_async_context(connect(Tell, at.address, policy=PATIENT))
    return lambda: client.note(sample())


async def _transport(at: At, stay: Stay) -> Transport:
    transport = open_address(at.address)
    await transport.open()
    stay.push_async_callback(transport.close)
    return transport


def _message(at: At, channel: Channel) -> Message:
    return Message(
        channel=channel,
        body=at.body(),
        id=new_id(),
        operation=at.name,
        sender="bench",
        version="1.0",
        media_type="application/json",
    )


async def answer_transport(at: At, _: Heard, stay: Stay) -> None:
    transport = await _transport(at, stay)

    async def receive(message: Message) -> Verdict:
        channel = Channel(message.reply_to, temporary=True)
        body, correlation = encode(at.sample(message.body)), message.correlation_id
        reply = Message(channel=channel, body=body, correlation_id=correlation, media_type="application/json")
        await transport.send(reply)
        return DONE

    await transport.serve(Channel(at.name), receive, "", MANY)
    await transport.ready()


async def ask_transport(at: At, stay: Stay) -> Call:
    replies = Replies(await _transport(at, stay), "bench")
    await replies.open()
    stay.push_async_callback(replies.close)
    channel = Channel(at.name)

    async def call() -> object:
        return decode((await replies.exchange(_message(at, channel))).body)

    return call


async def hear_transport(at: At, heard: Heard, stay: Stay) -> None:
    transport = await _transport(at, stay)

    async def receive(message: Message) -> Verdict:
        heard(at.sample(message.body))
        return DONE

    await transport.serve(Channel(at.name, durable=True), receive, "", MANY)
    await transport.ready()


async def tell_transport(at: At, stay: Stay) -> Call:
    transport, channel = await _transport(at, stay), Channel(at.name, durable=True)
    return lambda: transport.send(_message(at, channel))


ASK: Peers = {OURS: (answer_quintet, ask_quintet), ALONE: (answer_transport, ask_transport)}
TELL: Peers = {OURS: (hear_quintet, tell_quintet), ALONE: (hear_transport, tell_transport)}
