"""The jobs of ../README.md through valkey-py or redis-py."""

import importlib
import itertools
import json
import os
import sys
import threading
import time

# The package that is imported, its client's class, and that of a client of a Valkey Cluster.
LIBRARIES = {
    "valkey-py": ("valkey", "Valkey", "ValkeyCluster"),
    "redis-py": ("redis", "Redis", "RedisCluster"),
}
# Both libraries take the server's word away from these errors.
WORDS = {
    "ReadOnlyError": "READONLY",
    "AuthenticationError": "WRONGPASS",
    "NoPermissionError": "NOPERM",
    "BusyLoadingError": "LOADING",
    "ClusterDownError": "CLUSTERDOWN",
    "MasterDownError": "MASTERDOWN",
    "TryAgainError": "TRYAGAIN",
}
POOL_CLIENTS = 1_000
POOL_THREADS = 20
POOL_PERIOD_S = 5.0
# Longest wait for the first acknowledgements.
READY_S = 60.0

ended = threading.Event()


def now_ms():
    return int(time.time() * 1000)


class Log:
    """What one task saw."""

    def __init__(self, job, task, key, period_s):
        self.job, self.task, self.key, self.period_s = job, task, key, period_s
        self.acks, self.errors = [], []

    def ack(self, number):
        self.acks.append((number, now_ms()))

    def error(self, error):
        kind = type(error).__name__
        first = (str(error).split() or [""])[0]
        if kind in WORDS:
            kind = WORDS[kind]
        elif kind == "ResponseError" and first.isupper():
            kind = first
        self.errors.append((now_ms(), kind))

    def line(self, library, at):
        return {
            "library": library,
            "job": self.job,
            "task": self.task,
            "key": self.key,
            "period_ms": int(self.period_s * 1000),
            "ended_ms": at,
            "acks": list(self.acks),
            "errors": list(self.errors),
        }


def repeat(log, operation):
    """Calls it with a new number for each try, until the end."""
    for number in itertools.count(1):
        if ended.is_set():
            return
        try:
            operation(number)
            log.ack(number)
        except Exception as error:
            log.error(error)
        time.sleep(log.period_s)


def receive(log, receiving):
    """Notes the numbers that come, until the end."""
    while not ended.is_set():
        try:
            number = receiving()
            if number is not None:
                log.ack(number)
        except Exception as error:
            log.error(error)
            time.sleep(0.01)


class Work:
    """The jobs of one library at one address."""

    def __init__(self, library, topology, address, run):
        package, single, cluster = LIBRARIES[library]
        self.library, self.topology = library, topology
        self.host, port = address.rsplit(":", 1)
        self.port = int(port)
        self.open = getattr(importlib.import_module(package), cluster if topology == "Cluster" else single)
        self.prefix = f"{run}:{library}"
        self.password = os.environ["VALKEY_PASSWORD"]
        self.logs = []

    def client(self):
        return self.open(host=self.host, port=self.port, password=self.password)

    def log(self, job, task=0, key=None, period_s=0.02):
        log = Log(job, task, key, period_s)
        self.logs.append(log)
        return log

    def begin(self, function, *arguments):
        threading.Thread(target=function, args=arguments, daemon=True).start()

    def write(self):
        client = self.client()
        for task in range(6):
            log = self.log("write", task, f"{self.prefix}:write:{{{task}}}", 0.01)
            self.begin(repeat, log, lambda number, key=log.key: client.sadd(key, number))

    def multi(self):
        if self.topology == "Cluster" and self.library == "valkey-py":
            # It has no transactions there.
            return
        client = self.client()
        for task in range(2):
            log = self.log("multi", task, f"{self.prefix}:multi:{{{task}}}", 0.01)

            def transaction(number, key=log.key):
                with client.pipeline(transaction=True) as pipeline:
                    pipeline.sadd(key, number)
                    pipeline.incr(f"{key}:count")
                    pipeline.execute()

            self.begin(repeat, log, transaction)

    def subscriber(self):
        publisher, channel = self.client(), f"{self.prefix}:channel"
        subscription = self.client().pubsub()
        subscription.subscribe(channel)

        def message():
            found = subscription.get_message(ignore_subscribe_messages=True, timeout=1.0)
            return int(found["data"]) if found else None

        self.begin(receive, self.log("subscriber"), message)
        self.begin(repeat, self.log("publish"), lambda number: publisher.publish(channel, number))

    def blpop(self):
        client, key = self.client(), f"{self.prefix}:list"

        def number():
            found = client.blpop([key], timeout=1)
            return int(found[1]) if found else None

        self.begin(receive, self.log("blpop"), number)
        self.begin(repeat, self.log("push"), lambda number: client.rpush(key, number))

    def pool(self):
        def some(part):
            clients = [(log, self.client()) for log in part]
            for number in itertools.count(1):
                for log, client in clients:
                    if ended.is_set():
                        return
                    try:
                        client.sadd(log.key, number)
                        log.ack(number)
                    except Exception as error:
                        log.error(error)
                    time.sleep(POOL_PERIOD_S / len(clients))

        logs = [
            self.log("pool", task, f"{self.prefix}:pool:{task}", POOL_PERIOD_S) for task in range(POOL_CLIENTS)
        ]
        for first in range(POOL_THREADS):
            self.begin(some, logs[first::POOL_THREADS])


def read_to_end():
    # Not sys.stdin, which would have to be locked at the end.
    while os.read(0, 4096):
        pass
    ended.set()


def main():
    library, topology, address, seconds, run, jobs = sys.argv[1:7]
    begun = time.monotonic()
    threading.Thread(target=read_to_end, daemon=True).start()
    work = Work(library, topology, address, run)
    for job in jobs.split(","):
        getattr(work, job)()
    while not all(log.acks for log in work.logs) and time.monotonic() - begun < READY_S and not ended.is_set():
        time.sleep(0.05)
    print(json.dumps({"ready": all(log.acks for log in work.logs)}), flush=True)
    ended.wait(max(0.0, float(seconds) - (time.monotonic() - begun)))
    at = now_ms()
    ended.set()
    for log in work.logs:
        print(json.dumps(log.line(library, at)))
    sys.stdout.flush()
    # Threads that hang in the library would keep the process.
    os._exit(0)


main()
