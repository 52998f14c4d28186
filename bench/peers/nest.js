// The RabbitMQ transport of NestJS as it is by default: no acknowledgements, replies by direct reply-to.

import "reflect-metadata";
import { Logger } from "@nestjs/common";
import { ClientRMQ, ServerRMQ } from "@nestjs/microservices";
import { firstValueFrom } from "rxjs";

// The standard output is for figures.
Logger.overrideLogger(false);

export async function serve(place) {
  const server = new ServerRMQ(options(place));
  server.addHandler("echo", async (body) => body);
  await new Promise((resolve, reject) => server.listen((error) => (error ? reject(error) : resolve())));
}

export async function client(place) {
  const client = new ClientRMQ(options(place));
  await client.connect();
  return (body) => firstValueFrom(client.send("echo", body));
}

function options({ url, service, prefetch }) {
  return {
    urls: [url],
    queue: service,
    queueOptions: { durable: false },
    prefetchCount: prefetch,
    socketOptions: { connectionOptions: { noDelay: true } },
  };
}
