// One half of a peer that runs on Node: `node half.js serve|call --contender=NAME --url=URL --service=NAME --prefetch=N`.
// It speaks as the other halves of the bench do: the line `ready`, then a point as a line of JSON in and its figures out; it ends
// when its standard input does.

import { createInterface } from "node:readline";
import { parseArgs } from "node:util";
import { measure } from "./load.js";
import * as moleculer from "./moleculer.js";
import * as nest from "./nest.js";

const contenders = { moleculer, nest };
const { positionals, values: place } = parseArgs({
  allowPositionals: true,
  strict: false,
  options: {
    contender: { type: "string" },
    url: { type: "string" },
    service: { type: "string" },
    prefetch: { type: "string" },
  },
});
const contender = contenders[place.contender];
place.prefetch = Number(place.prefetch);

if (positionals[0] === "serve") {
  await contender.serve(place);
  console.log("ready");
  process.stdin.on("end", () => process.exit()).resume();
} else {
  const call = await contender.client(place);
  console.log("ready");
  for await (const line of createInterface({ input: process.stdin })) {
    console.log(JSON.stringify(await measure(call, JSON.parse(line))));
  }
  process.exit();
}
