// What the map draws: columns of the samples, filters, colours and counts.  All by row, nothing of it depends on the page.

import { get, getBinary, post } from "./api";
import { CHOSEN, GREY } from "./scatter";

export interface Column {
  name: string;
  kind: "number" | "category" | "text";
  values: string[];
  several: boolean; // a sample may have several of the values: see fetchMembers
}

export interface Columns {
  version: string;
  samples: number;
  columns: Column[];
}

export interface Layouts {
  kinds: string[];
  classes: { class_index: number; class: string; size: number; kept: boolean }[];
  cells: { class: string; x: number; y: number; size: number }[];
}

export interface Progress {
  state: "ready" | "absent" | "working" | "failed";
  points?: number;
  done?: number;
  total?: number;
  seconds_left?: number | null;
  failure?: string;
}

export interface Kept {
  views: { name: string; state: string; at: string }[];
  selections: { id: string; name: string; size: number; at: string }[];
}

export interface Facts {
  id: string;
  label: string | null;
  prediction: string | null;
  probability: number | null;
  class: string | null;
  findings: string[];
  outlier: number | null;
  cluster: number | null;
}

export const UNKNOWN = 0xffffffff;
export type Values = Float32Array | Uint32Array;
/** By code of a column of which a sample may have several values: the samples that have it. */
export type Members = Uint32Array[];
export type Colour = [number, number, number];

const arrays = new Map<string, Promise<ArrayBuffer>>();
const KEPT_ARRAYS = 24;

function fetchOnce(path: string): Promise<ArrayBuffer> {
  let found = arrays.get(path);
  if (found === undefined) {
    found = getBinary(path).then((response) => response.arrayBuffer());
    found.catch(() => arrays.delete(path));
    arrays.set(path, found);
    if (arrays.size > KEPT_ARRAYS) arrays.delete(arrays.keys().next().value as string);
  }
  return found;
}

export async function fetchColumn(run: number, version: string, column: Column): Promise<Values> {
  const name = encodeURIComponent(column.name);
  const buffer = await fetchOnce(`runs/${run}/columns/${name}?version=${version}`);
  return column.kind === "number" ? new Float32Array(buffer) : new Uint32Array(buffer);
}

export async function fetchMembers(run: number, version: string, column: Column): Promise<Members> {
  const whole = new Uint32Array(await fetchOnce(`runs/${run}/members/${encodeURIComponent(column.name)}?version=${version}`));
  const found: Members = [];
  for (let at = 0; at < whole.length; at += 1 + whole[at]!) found.push(whole.subarray(at + 1, at + 1 + whole[at]!));
  return found;
}

export async function fetchPoints(run: number, version: string, layout: string): Promise<Float32Array> {
  return new Float32Array(await fetchOnce(`runs/${run}/layouts/${layout}/points?version=${version}`));
}

export async function selectWithin(run: number, layout: string, outline: object): Promise<Uint32Array> {
  const response = await post(`runs/${run}/select`, { layout, ...outline });
  return new Uint32Array(await response.arrayBuffer());
}

export async function fetchFacts(run: number, rows: number[]): Promise<Facts[]> {
  return (await post(`runs/${run}/facts`, { rows })).json() as Promise<Facts[]>;
}

/** Keep a selection on the server; its id, which links hold. */
export async function keepSelection(run: number, mask: Uint8Array, name = ""): Promise<string> {
  const bits = new Uint8Array(Math.ceil(mask.length / 8));
  for (let row = 0; row < mask.length; row++) if (mask[row]) bits[row >> 3]! |= 1 << (row & 7);
  const packed = new Response(new Blob([bits]).stream().pipeThrough(new CompressionStream("deflate")));
  const bytes = new Uint8Array(await packed.arrayBuffer());
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  const answer = await post(`runs/${run}/selections`, { bits: btoa(text), name });
  return ((await answer.json()) as { id: string }).id;
}

export async function fetchSelection(run: number, id: string, samples: number): Promise<Uint8Array> {
  const rows = new Uint32Array(await (await getBinary(`runs/${run}/selections/${id}`)).arrayBuffer());
  const mask = new Uint8Array(samples);
  for (const row of rows) mask[row] = 1;
  return mask;
}

export const fetchKept = (run: number) => get<Kept>(`runs/${run}/views`);

// ---- filters -----------------------------------------------------------------------------------------------------------

/** What passes: codes of a category (UNKNOWN for none), or all but these, or numbers from ``low`` to ``high``. */
export type Filter = { codes: number[]; not: boolean } | { low: number; high: number };
export type Filters = Map<string, Filter>;

export const passes = (filter: Filter | undefined, code: number) =>
  !filter || !("codes" in filter) || filter.codes.includes(code) !== filter.not;

/** Of several values of a sample the one that it is drawn as: its first, unless only another one passes. */
export function firstPassing(values: Uint32Array, members: Members, filter: Filter | undefined): Uint32Array {
  const first = values.slice();
  for (let code = members.length - 1; code >= 0; code--)
    if (passes(filter, code)) for (const row of members[code]!) if (!passes(filter, values[row]!)) first[row] = code;
  return first;
}

/** As they stand in the address: label:0.3;finding:!n;outlier:1.2..4 */
export function readFilters(text: string): Filters {
  const found: Filters = new Map();
  for (const part of text.split(";")) {
    const [name, what] = part.split(":");
    if (!name || !what) continue;
    const range = /^(-?[\d.e+-]*?)\.\.(-?[\d.e+-]*)$/.exec(what);
    const [low, high] = range ? [range[1] ? Number(range[1]) : -Infinity, range[2] ? Number(range[2]) : Infinity] : [NaN, NaN];
    try {
      if (range) found.set(decodeURIComponent(name), { low, high });
      else {
        const codes = what.replace("!", "").split(".");
        const not = what.startsWith("!");
        found.set(decodeURIComponent(name), { codes: codes.map((code) => (code === "n" ? UNKNOWN : Number(code))), not });
      }
    } catch {
      // a damaged link: this filter is left out
    }
  }
  return found;
}

export function writeFilters(filters: Filters): string {
  return [...filters]
    .map(([name, filter]) => {
      const ends = "low" in filter ? [filter.low, filter.high].map((end) => (Number.isFinite(end) ? String(end) : "")) : [];
      if ("low" in filter) return `${encodeURIComponent(name)}:${ends.join("..")}`;
      const codes = filter.codes.map((code) => (code === UNKNOWN ? "n" : String(code)));
      return `${encodeURIComponent(name)}:${filter.not ? "!" : ""}${codes.join(".")}`;
    })
    .join(";");
}

/** GREY for the samples that do not pass, CHOSEN for those that are selected.  Of several values one that passes will do. */
export function flag(samples: number, filters: [Filter, Values, Members | undefined][], mask: Uint8Array | undefined): Uint8Array {
  const flags = new Uint8Array(samples);
  for (const [filter, values, members] of filters) {
    if (members) {
      const first = firstPassing(values as Uint32Array, members, filter);
      for (let row = 0; row < samples; row++) if (!passes(filter, first[row]!)) flags[row] = GREY;
    } else if ("codes" in filter) {
      const named = new Set(filter.codes);
      for (let row = 0; row < samples; row++) if (named.has(values[row]!) === filter.not) flags[row] = GREY;
    } else {
      for (let row = 0; row < samples; row++) if (!(values[row]! >= filter.low && values[row]! <= filter.high)) flags[row] = GREY;
    }
  }
  if (mask) for (let row = 0; row < samples; row++) if (mask[row]) flags[row]! |= CHOSEN;
  return flags;
}

// ---- colours -----------------------------------------------------------------------------------------------------------

const NAMED = 24; // values with a colour of their own
const RAMPS = {
  light: ["#35208c", "#1565a8", "#138a72", "#7c9a1f", "#d08a00"],
  dark: ["#7d6cf0", "#4fa3e8", "#4cc9a4", "#b6d957", "#ffd34d"],
};
const MEANT: Record<string, string[]> = {
  correct: ["accent", "bad"],
  verdict: ["bad", "open", "good"],
  judged: ["bad", "good", "open"],
};

export interface Group {
  code: number; // UNKNOWN: no value; -1: all values without a colour of their own
  name: string;
  colour: Colour;
  shown: number; // on the map, passing the filters
  coloured: number; // of these, in this colour: others have several values, and the colour of another one
  grey: number; // on the map, not passing
  chosen: number;
}

export interface Colouring {
  codes: Uint8Array; // places in the palette, by sample
  palette: Colour[];
  place: Uint8Array; // of each value of a category in the palette; 0: it has no colour of its own
  low: number; // of a number: the ends of the ramp
  high: number;
}

function parse(text: string): Colour {
  const hex = text.trim().replace("#", "");
  return [0, 2, 4].map((at) => Number.parseInt(hex.slice(at, at + 2), 16)) as Colour;
}

export const css = (colour: Colour) => `rgb(${colour.join()})`;
function variable(name: string): Colour {
  return parse(getComputedStyle(document.documentElement).getPropertyValue(`--${name}`));
}

export const greyColour = () => variable("rest");

const FREE = [120, 5, 55, 190, 300, 245]; // hues between those of g0 to g5

/** A colour for the values beyond the six that have one in charts.css; the table names all of them. */
function hue(number: number, dark: boolean): Colour {
  const angle = FREE[number - 6] ?? (number * 137.508) % 360;
  const light = (dark ? 0.68 : 0.4) + (number >= 12 ? (number % 2 ? 0.1 : -0.1) : 0);
  const strong = 0.62 * Math.min(light, 1 - light);
  return [0, 8, 4].map((n) => {
    const k = (n + angle / 30) % 12;
    return Math.round(255 * (light - strong * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  }) as Colour;
}

export function rampColours(dark: boolean, steps = 254): Colour[] {
  const stops = RAMPS[dark ? "dark" : "light"].map(parse);
  return Array.from({ length: steps }, (_, i) => {
    const at = (i / (steps - 1)) * (stops.length - 1);
    const low = Math.min(stops.length - 2, Math.floor(at));
    return stops[low]!.map((value, c) => Math.round(value + (at - low) * (stops[low + 1]![c]! - value))) as Colour;
  });
}

/** Codes and colours of a column; entry 0 of the palette is for no value, 1 for values beyond those that have a colour. */
export function colourBy(column: Column, values: Values, rows: Uint32Array, dark: boolean): Colouring {
  const codes = new Uint8Array(values.length);
  const rest = variable("rest");
  if (column.kind === "number") {
    const [low, high] = spread(values as Float32Array, rows);
    const step = 253 / (high - low || 1);
    for (let row = 0; row < values.length; row++) {
      const value = values[row]!;
      if (value === value) codes[row] = 2 + Math.min(253, Math.max(0, Math.round((value - low) * step)));
    }
    return { codes, palette: [rest, rest, ...rampColours(dark)], place: new Uint8Array(0), low, high };
  }
  const place = new Uint8Array(column.values.length);
  const chosen = named(column, values as Uint32Array, rows);
  chosen.forEach((code, i) => (place[code] = i + 2));
  for (let row = 0; row < values.length; row++) {
    const code = values[row]!;
    codes[row] = code === UNKNOWN ? 0 : place[code] || 1;
  }
  const meant = MEANT[column.name];
  const colours = chosen.map((_, i) => (meant ? variable(meant[i]!) : i < 6 ? variable(`g${i}`) : hue(i, dark)));
  return { codes, palette: [rest, variable("soft"), ...colours], place, low: 0, high: 0 };
}

/** The values that get a colour of their own: all, or of many the most frequent on this map, in their own order. */
function named(column: Column, values: Uint32Array, rows: Uint32Array): number[] {
  const all = column.values.map((_, code) => code);
  if (all.length <= NAMED) return all;
  const counts = new Uint32Array(all.length);
  for (const row of rows) if (values[row] !== UNKNOWN) counts[values[row]!]!++;
  return all.sort((a, b) => counts[b]! - counts[a]! || a - b).slice(0, NAMED).sort((a, b) => a - b);
}

/** The first and the last hundredth, so that one extreme does not take all colours. */
function spread(values: Float32Array, rows: Uint32Array): [number, number] {
  const step = Math.max(1, Math.floor(rows.length / 20_000));
  const some: number[] = [];
  for (let i = 0; i < rows.length; i += step) if (Number.isFinite(values[rows[i]!])) some.push(values[rows[i]!]!);
  some.sort((a, b) => a - b);
  if (!some.length) return [0, 1];
  return [some[Math.floor(0.01 * (some.length - 1))]!, some[Math.ceil(0.99 * (some.length - 1))]!];
}

/** How many points of the map have each value: ``values`` as they are drawn; all that have several, of ``members``. */
export function countGroups(
  column: Column, values: Values, rows: Uint32Array, flags: Uint8Array, colouring: Colouring, members: Members | undefined,
): Group[] {
  if (column.kind !== "category") return [];
  const size = column.values.length;
  const counts = [0, 1, 2].map(() => new Uint32Array(size + 1));
  const colourOf = new Uint8Array(size + 1);
  for (const row of rows) {
    const code = Math.min(values[row]!, size);
    const told = flags[row]!;
    counts[told & GREY ? 1 : 0]![code]!++;
    if (told & CHOSEN) counts[2]![code]!++;
    colourOf[code] = colouring.codes[row]!;
  }
  const coloured = counts[0]!.slice();
  if (members) {
    const mapped = new Uint8Array(values.length);
    for (const row of rows) mapped[row] = 1;
    members.forEach((all, code) => {
      const found = [0, 0, 0];
      for (const row of all) {
        if (!mapped[row]) continue;
        found[flags[row]! & GREY ? 1 : 0]!++;
        if (flags[row]! & CHOSEN) found[2]!++;
      }
      found.forEach((count, i) => (counts[i]![code] = count));
      colourOf[code] = colouring.place[code] || 1;
    });
  }
  const there: Group[] = [];
  for (let code = 0; code <= size; code++) {
    const [shown, grey, chosen] = counts.map((one) => one[code]!) as [number, number, number];
    if (!shown && !grey) continue;
    const name = code === size ? "none" : column.values[code]!;
    there.push({ code: code === size ? UNKNOWN : code, name, colour: colouring.palette[colourOf[code]!]!, shown, coloured: coloured[code]!, grey, chosen });
  }
  return there;
}
