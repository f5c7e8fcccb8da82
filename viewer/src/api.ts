// What the server is asked, and what it answers; see src/pfungst/viewer/server.py, or /api/openapi.json.

export type Verdict = "confirmed" | "open" | "refuted";
export type Answer = "cheat" | "legitimate" | "unsure" | "withdrawn";
export const ANSWERS: Answer[] = ["cheat", "legitimate", "unsure"];

export interface Overview {
  name: string;
  path: string;
  model: string;
  images: string;
  samples: number;
  classes: string[];
  target: string;
  preset: string;
  counts: Record<Verdict, number>;
  headline: string;
  recognition: { accuracy: number; labelled: number; right: number; warning: string; text: string } | null;
  untested: number;
}

export interface Judgement {
  answer: Answer;
  note: string;
  by: string;
  at: string;
  about: string;
}

export interface Listed {
  id: string;
  rank: number;
  class: string;
  class_index: number;
  size: number;
  prevalence: number;
  suspicion: number;
  head: string; // size, share, suspicion, views
  rule: string; // what decided, if the summary does not say it
  where: { kind: string; place: string; box: number[] | null; area: number; source: string };
  summary: string;
  verdict: Verdict;
  p: number;
  judgements: Judgement[];
  exemplars: (number | null)[];
}

export interface Evidence {
  test: string;
  n: number;
  treated: number;
  control: number;
  effect: number;
  interval: [number, number];
  p: number;
  probability: number;
  flips: number;
  control_flips: number;
}

/** A class's spectrum: SVG and what it says, as the server wrote them. */
export interface Spectrum {
  chart: string;
  text: string;
}

/** A picture of an experiment. */
export interface Shown {
  name: string;
  title: string;
  caption: string;
}

export interface Finding extends Listed {
  evidence: Evidence[];
  chart: string; // SVG of the evidence
  rows: number[];
  central: number[];
  rim: number[];
  nearest: number[];
  drawn: { name: string; title: string }[];
  facts: { name: string; lines: string[] }[];
  experiment: Shown[];
  again: { seed: number; verdict: Verdict; lines: string[] }[];
  spectrum: Spectrum;
}

export interface ClassEntry {
  class: string;
  class_index: number;
  size: number;
  mapped: boolean;
  clusters?: number;
  suspicion: number | null;
  note?: string;
}

export interface Relevance {
  height: number;
  width: number;
  values: Float32Array;
}

export class Failure extends Error {}

async function check(response: Response): Promise<Response> {
  if (response.ok) return response;
  let reason = `${response.status} ${response.statusText}`;
  try {
    reason = ((await response.json()) as { error?: string }).error ?? reason;
  } catch {
    // not JSON: the status has to do
  }
  throw new Failure(reason);
}

export async function get<T>(path: string): Promise<T> {
  return (await check(await fetch(`api/${path}`))).json() as Promise<T>;
}

export async function getBinary(path: string): Promise<Response> {
  return check(await fetch(`api/${path}`));
}

export async function post(path: string, body: unknown): Promise<Response> {
  const headers = { "Content-Type": "application/json" };
  return check(await fetch(`api/${path}`, { method: "POST", headers, body: JSON.stringify(body) }));
}

export async function remove(path: string): Promise<Response> {
  return check(await fetch(`api/${path}`, { method: "DELETE" }));
}

export async function judge(run: number, finding: string, answer: Answer, note: string): Promise<Listed> {
  return (await post(`runs/${run}/findings/${finding}/judgements`, { answer, note })).json() as Promise<Listed>;
}

/** The last thing said of a finding; "" where nobody did, or it was taken back. */
export function lastAnswer(finding: { judgements: Judgement[] }): Answer | "" {
  const answer = finding.judgements.at(-1)?.answer ?? "";
  return answer === "withdrawn" ? "" : answer;
}

export function sampleUrl(run: number, row: number, side: number, part: "whole" | "input" = "whole"): string {
  return `api/runs/${run}/samples/${row}/picture?side=${side}&part=${part}`;
}

export function findingUrl(run: number, finding: string, name: string): string {
  return `api/runs/${run}/findings/${finding}/pictures/${name}`;
}

const maps = new Map<string, Promise<Relevance>>();
const KEPT_MAPS = 600;

/** A sample's map of relevance; asked for once. */
export function relevanceOf(run: number, row: number): Promise<Relevance> {
  const key = `${run}/${row}`;
  let found = maps.get(key);
  if (found === undefined) {
    found = getBinary(`runs/${run}/samples/${row}/relevance`).then(async (response) => ({
      height: Number(response.headers.get("X-Height")),
      width: Number(response.headers.get("X-Width")),
      values: new Float32Array(await response.arrayBuffer()),
    }));
    found.catch(() => maps.delete(key));
    maps.set(key, found);
    if (maps.size > KEPT_MAPS) maps.delete(maps.keys().next().value as string);
  }
  return found;
}

export interface Palettes {
  palettes: Record<string, [number, number, number][]>;
  one_sided: string[];
}

let palettes: Promise<Palettes> | undefined;
export function getPalettes(): Promise<Palettes> {
  palettes ??= get<Palettes>("palettes");
  return palettes;
}
