"""A plain RPC client, as the RabbitMQ tutorial has it: rpc_client.py URL QUEUE N... (or --direct for direct reply-to)."""

import sys
import uuid

import pika


class RpcClient:
    def __init__(self, url, direct):
        self.connection = pika.BlockingConnection(pika.URLParameters(url))
        self.channel = self.connection.channel()
        if direct:
            self.callback_queue = "amq.rabbitmq.reply-to"
        else:
            self.callback_queue = self.channel.queue_declare(queue="", exclusive=True).method.queue
        self.channel.basic_consume(
            queue=self.callback_queue, on_message_callback=self.on_response, auto_ack=True
        )
        self.correlation_id = None
        self.response = None

    def on_response(self, channel, method, properties, body):
        if self.correlation_id == properties.correlation_id:
            self.response = body

    def call(self, queue, body):
        self.response = None
        self.correlation_id = str(uuid.uuid4()).upper()
        self.channel.basic_publish(
            exchange="",
            routing_key=queue,
            properties=pika.BasicProperties(
                reply_to=self.callback_queue, correlation_id=self.correlation_id
            ),
            body=body,
        )
        self.connection.process_data_events(time_limit=15)
        if self.response is None:
            sys.exit("no reply with the correlation id of the request")
        return self.response


def main():
    arguments = [argument for argument in sys.argv[1:] if argument != "--direct"]
    url, queue, bodies = arguments[0], arguments[1], arguments[2:]
    client = RpcClient(url, direct="--direct" in sys.argv)
    for body in bodies:
        print(client.call(queue, body).decode())
    client.connection.close()


main()
