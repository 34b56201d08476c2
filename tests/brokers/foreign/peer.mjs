// A peer that knows nothing of Quintet: Node's usual client of each broker, and the names that the docs tell.
//
//   node peer.mjs BROKER send    HOST:PORT PLACE BODY   sends a JSON message, ends when the broker has accepted it
//   node peer.mjs BROKER receive HOST:PORT PLACE        prints "ready", then the body of the next message, and ends
//
// PLACE is what the broker calls it: EXCHANGE/ROUTING-KEY, a STOMP destination, a Kafka topic, an NSQ TOPIC/CHANNEL.
// A client is not closed at the end: what counts is known by then, and the process ends with it.

import { once } from "node:events";
import { promisify } from "node:util";

const [broker, verb, address, place, body] = process.argv.slice(2);
const [host, port] = address.split(":");
const [first, second] = place.split("/");
const ready = () => console.log("ready");

const peers = {
  rabbitmq: {
    async send() {
      const channel = await (await rabbitmq()).createConfirmChannel();
      channel.on("return", () => end(1, "unroutable"));
      channel.publish(first, second, Buffer.from(body), {
        contentType: "application/json",
        persistent: true,
        mandatory: true,
      });
      await channel.waitForConfirms();
    },
    async receive() {
      const channel = await (await rabbitmq()).createChannel();
      const { queue } = await channel.assertQueue("", { exclusive: true });
      await channel.bindQueue(queue, first, second);
      const message = new Promise((resolve) => channel.consume(queue, resolve, { noAck: true }).then(ready));
      return (await message).content.toString();
    },
  },

  activemq: {
    async send() {
      const frame = (await activemq()).send(
        { destination: place, "content-type": "application/json", persistent: "true" },
        { onReceipt: () => end(0) },
      );
      frame.end(body);
      await new Promise(() => {});
    },
    async receive() {
      const client = await activemq();
      const message = new Promise((resolve, reject) =>
        client.subscribe({ destination: place, ack: "auto" }, (error, arrived) =>
          error ? reject(error) : resolve(promisify(arrived.readString.bind(arrived))("utf8")),
        ),
      );
      // this client tells no receipt of a subscription; what is sent behind it is answered behind it
      client.send({ destination: "/topic/foreign.mark" }, { onReceipt: ready }).end("");
      return message;
    },
  },

  kafka: {
    async send() {
      const producer = (await kafka()).producer();
      await producer.connect();
      const headers = { "content-type": "application/json" };
      await producer.send({ topic: place, messages: [{ value: body, headers }] });
    },
    async receive() {
      const consumer = (await kafka()).consumer({ groupId: `foreign-${process.pid}` });
      await consumer.connect();
      await consumer.subscribe({ topic: place, fromBeginning: true });
      consumer.on(consumer.events.GROUP_JOIN, ready);
      return new Promise((resolve) =>
        consumer.run({ eachMessage: async ({ message }) => resolve(message.value.toString()) }),
      );
    },
  },

  nsq: {
    async send() {
      const { Writer } = await import("nsqjs").then((module) => module.default);
      const writer = new Writer(host, Number(port));
      writer.connect();
      await once(writer, "ready");
      await promisify(writer.publish.bind(writer))(place, body);
    },
    async receive() {
      const { Reader } = await import("nsqjs").then((module) => module.default);
      const reader = new Reader(first, second, { nsqdTCPAddresses: [address] });
      reader.on("ready", ready); // that it is connected it says before it has subscribed
      reader.connect();
      const [message] = await once(reader, "message");
      message.finish();
      await once(message, "respond"); // it is sent by then
      return message.body.toString();
    },
  },
};

async function rabbitmq() {
  const { connect } = await import("amqplib");
  return connect(`amqp://guest:guest@${address}`);
}

async function activemq() {
  const { default: stompit } = await import("stompit");
  const connectHeaders = { host: "/", login: "quintet", passcode: "quintet", "heart-beat": "0,0" };
  return promisify(stompit.connect)({ host, port: Number(port), connectHeaders });
}

async function kafka() {
  const { Kafka, logLevel } = await import("kafkajs").then((module) => module.default);
  return new Kafka({ brokers: [address], logLevel: logLevel.ERROR });
}

function end(code, words) {
  if (words) console.error(words);
  process.exit(code);
}

setTimeout(() => end(1, "nothing came"), 20_000);
peers[broker]
  [verb]()
  .then((said) => {
    if (said !== undefined) console.log(said);
    end(0);
  })
  .catch((error) => end(1, error.stack));
