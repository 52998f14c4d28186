"""A plain RPC server, as the RabbitMQ tutorial has it: rpc_server.py URL QUEUE CALLS; ends after so many calls."""

import sys

import pika


def fib(n):
    this, following = 0, 1
    for _ in range(n):
        this, following = following, this + following
    return this


def main():
    url, queue, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.queue_declare(queue=queue, durable=True, arguments={"x-queue-type": "quorum"})
    channel.basic_qos(prefetch_count=1)
    print("ready", flush=True)
    for served, (method, properties, body) in enumerate(channel.consume(queue, inactivity_timeout=20), start=1):
        if method is None:
            sys.exit("no request came")
        channel.basic_publish(
            exchange="",
            routing_key=properties.reply_to,
            properties=pika.BasicProperties(correlation_id=properties.correlation_id),
            body=str(fib(int(body))),
        )
        channel.basic_ack(delivery_tag=method.delivery_tag)
        if served == calls:
            break
    channel.cancel()
    connection.close()


main()
