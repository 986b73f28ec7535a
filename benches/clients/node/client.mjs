// The jobs of ../README.md through iovalkey or ioredis.

import * as ioredis from "ioredis";
import * as iovalkey from "iovalkey";

const POOL_CLIENTS = 1_000;
const POOL_PERIOD_MS = 5_000;
// Longest wait for the first acknowledgements.
const READY_MS = 60_000;
const LIBRARIES = {
  ioredis: { single: ioredis.Redis, cluster: ioredis.Cluster },
  iovalkey: { single: iovalkey.Redis, cluster: iovalkey.Cluster },
};

const [library, topology, address, seconds, run, jobs] = process.argv.slice(2);
const [host, port] = [address.slice(0, address.lastIndexOf(":")), Number(address.slice(address.lastIndexOf(":") + 1))];
const password = process.env.VALKEY_PASSWORD;
const prefix = `${run}:${library}`;
const begun = Date.now();
const logs = [];
let ended = false;

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

function open() {
  const { single, cluster } = LIBRARIES[library];
  const client =
    topology === "Cluster"
      ? new cluster([{ host, port }], { redisOptions: { password } })
      : new single({ host, port, password });
  // Without a listener it would write to the standard error output; operations have their own errors.
  client.on("error", () => {});
  return client;
}

function kind(error) {
  const first = (error.message ?? "").split(" ")[0];
  if (error.code && /^E[A-Z]+$/.test(error.code)) return error.code;
  if (/^[A-Z]{3,}$/.test(first)) return first;
  return error.name === "Error" ? first : error.name;
}

function newLog(job, task = 0, key = null, period_ms = 20) {
  const log = { library, job, task, key, period_ms, ended_ms: 0, acks: [], errors: [] };
  logs.push(log);
  return log;
}

// Calls it with a new number for each try, until the end.
async function repeat(log, operation) {
  for (let number = 1; !ended; number++) {
    try {
      await operation(number);
      log.acks.push([number, Date.now()]);
    } catch (error) {
      log.errors.push([Date.now(), kind(error)]);
    }
    await pause(log.period_ms);
  }
}

const JOBS = {
  write() {
    const client = open();
    for (let task = 0; task < 6; task++) {
      const log = newLog("write", task, `${prefix}:write:{${task}}`, 10);
      repeat(log, (number) => client.sadd(log.key, number));
    }
  },
  multi() {
    const client = open();
    for (let task = 0; task < 2; task++) {
      const log = newLog("multi", task, `${prefix}:multi:{${task}}`, 10);
      repeat(log, async (number) => {
        const answers = await client.multi().sadd(log.key, number).incr(`${log.key}:count`).exec();
        const wrong = answers.find(([error]) => error);
        if (wrong) throw wrong[0];
      });
    }
  },
  subscriber() {
    const [publisher, subscriber, channel] = [open(), open(), `${prefix}:channel`];
    const received = newLog("subscriber");
    subscriber.on("message", (_channel, text) => received.acks.push([Number(text), Date.now()]));
    subscriber.subscribe(channel).catch((error) => received.errors.push([Date.now(), kind(error)]));
    repeat(newLog("publish"), (number) => publisher.publish(channel, number));
  },
  async blpop() {
    // A connection that waits can do nothing else.
    const [waiting, pushing, key] = [open(), open(), `${prefix}:list`];
    const popped = newLog("blpop");
    repeat(newLog("push"), (number) => pushing.rpush(key, number));
    while (!ended) {
      try {
        const found = await waiting.blpop(key, 1);
        if (found) popped.acks.push([Number(found[1]), Date.now()]);
      } catch (error) {
        popped.errors.push([Date.now(), kind(error)]);
        await pause(10);
      }
    }
  },
  pool() {
    for (let task = 0; task < POOL_CLIENTS; task++) {
      const log = newLog("pool", task, `${prefix}:pool:${task}`, POOL_PERIOD_MS);
      const client = open();
      // Not all at once.
      pause((task * POOL_PERIOD_MS) / POOL_CLIENTS).then(() => repeat(log, (number) => client.sadd(log.key, number)));
    }
  },
};

process.stdin.on("end", () => (ended = true)).resume();
for (const job of jobs.split(",")) JOBS[job]();
const ready = () => logs.every((log) => log.acks.length > 0);
while (!ready() && Date.now() - begun < READY_MS && !ended) await pause(50);
console.log(JSON.stringify({ ready: ready() }));
while (!ended && Date.now() - begun < seconds * 1_000) await pause(20);
const at = Date.now();
const lines = logs.map((log) => JSON.stringify({ ...log, ended_ms: at }) + "\n");
// The end must not come before all of it is written.
process.stdout.write(lines.join(""), () => process.exit(0));
