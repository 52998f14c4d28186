// The closed loop of bench/src/load.rs: as many callers as calls at once, each calling again as soon as it has its reply.

import { readdirSync, readFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";

export async function measure(call, point) {
  if (point.arrivals !== "Closed") throw new Error("a peer on Node is only measured in a closed loop");
  const body = "x".repeat(point.size);
  const latencies = [];
  let phase = "warming";
  const caller = async () => {
    let started = performance.now();
    while (phase !== "over") {
      const reply = await call(body);
      if (reply.length !== body.length) throw new Error(`a reply of ${reply.length} characters to ${body.length}`);
      const ended = performance.now();
      if (phase === "measuring") latencies.push(ended - started);
      started = ended;
    }
  };
  const callers = Promise.all(Array.from({ length: point.concurrency }, caller));
  const clock = async () => {
    await sleep(millis(point.warm_up));
    const before = used(point.watched);
    const begun = performance.now();
    phase = "measuring";
    await sleep(millis(point.length));
    phase = "over";
    const lasted = (performance.now() - begun) / 1e3;
    return { before, after: used(point.watched), lasted };
  };
  const [{ before, after, lasted }] = await Promise.all([clock(), callers]);
  return figures(latencies.sort((left, right) => left - right), before, after, lasted);
}

function figures(latencies, before, after, lasted) {
  const calls = latencies.length;
  if (calls === 0) throw new Error("no call ended in time");
  const micros = (quantile) => latencies[Math.min(calls - 1, Math.floor(quantile * calls))] * 1e3;
  const spent = (of) => after[of] - before[of];
  return {
    calls_per_second: calls / lasted,
    p50_us: micros(0.5),
    p99_us: micros(0.99),
    p999_us: micros(0.999),
    cpu_per_1000: (spent("ends") / calls) * 1e3,
    broker_cpu_per_1000: (spent("broker") / calls) * 1e3,
    other_load: Math.max(0, spent("machine") - spent("ends") - spent("broker")) / lasted,
  };
}

const millis = ({ secs, nanos }) => secs * 1e3 + nanos / 1e6;

// Processor time in seconds, as in bench/src/cpu.rs.
function used({ ends, broker }) {
  const sum = (processes) => processes.map(ofProcess).reduce((left, right) => left + right, 0);
  return { ends: sum(ends), broker: sum(broker), machine: ofMachine() };
}

function ofProcess(id) {
  let nanos = 0;
  try {
    for (const thread of readdirSync(`/proc/${id}/task`)) {
      nanos += Number(readFileSync(`/proc/${id}/task/${thread}/schedstat`, "utf8").split(" ")[0]);
    }
  } catch {
    // It is gone, or one of its threads is.
  }
  return nanos / 1e9;
}

function ofMachine() {
  const ticks = readFileSync("/proc/stat", "utf8").split("\n")[0].trim().split(/\s+/).slice(1).map(Number);
  // user, nice, system, idle, iowait, irq, softirq, steal: all but those in which nothing runs.
  const busy = [0, 1, 2, 5, 6, 7].reduce((sum, index) => sum + ticks[index], 0);
  return busy / 100;
}
