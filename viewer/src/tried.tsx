// What the model says to a changed picture: before and after side by side, their maps, and the scores.

import { useMemo, useState } from "preact/hooks";
import type { Relevance } from "./api";
import { signed } from "./finding";
import { ModeButtons, PaletteChoice, readLook } from "./look";
import { Picture, scaleOf, WHOLE, type Look } from "./pictures";
import type { State } from "./state";

export interface Score {
  class: string;
  class_index: number;
  scores: number[]; // before, after, and of the control if there is one
  probabilities: number[];
}

export interface Tried {
  target: number;
  scores: Score[]; // the explained class first
  decisions: string[];
  area: number;
  size: [number, number];
  before: string;
  after: string;
  control: string | null;
  ordinary: number | null; // of a paste: the sample whose region is the control
  maps: [string, string] | null;
  seconds: number;
}

/** A map from base64 of little-endian float32. */
export function decodeMap(text: string, [height, width]: [number, number]): Relevance {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return { height, width, values: new Float32Array(bytes.buffer) };
}

export function Result(props: { run: number; row: number; tried: Tried; what: string; seconds: number; state: State }) {
  const { tried, state } = props;
  const [zoom, setZoom] = useState(WHOLE);
  const maps = useMemo(() => tried.maps?.map((one) => decodeMap(one, tried.size)), [tried]);
  const asked = readLook(state, "overlay");
  const look: Look = { ...asked, mode: maps ? asked.mode : "input", opacity: 0.9, same: true };
  const pictures = [tried.before, tried.after, ...(tried.control ? [tried.control] : [])];
  const names = ["before", "after", "control"];
  const target = tried.scores[0]!;
  const change = target.scores[1]! - target.scores[0]!;
  return (
    <section aria-label="Result" aria-live="polite">
      <h3>
        {props.what}: the score of {target.class} goes from {target.scores[0]!.toFixed(2)} to {target.scores[1]!.toFixed(2)} (
        {signed(change)})
      </h3>
      <p>
        Taken for <b>{tried.decisions[0]}</b> before, for <b>{tried.decisions[1]}</b> after.{" "}
        {tried.control &&
          `${tried.ordinary === null ? "The same change where relevance is not" : `The same region of sample ${tried.ordinary}, of the same class but of no finding of this one`}: ${signed(target.scores[2]! - target.scores[0]!)}, taken for ${tried.decisions[2]}. `}
        <span class="soft">
          {(100 * tried.area).toFixed(1)} % of the picture; {(1000 * props.seconds).toFixed(0)} ms there and back (
          {(1000 * tried.seconds).toFixed(0)} ms of it the model's).
        </span>
      </p>
      <div class="line tools">
        <ModeButtons mode={look.mode} only={maps ? undefined : "input"} />
        <PaletteChoice palette={look.palette} />
      </div>
      <div class="outcome">
        <div class="pictures three">
          {pictures.map((one, i) => (
            <Picture
              key={names[i]}
              run={props.run}
              row={props.row}
              src={`data:image/png;base64,${one}`}
              look={i === 2 ? { ...look, mode: "input" } : look}
              map={maps?.[i]}
              scale={scaleOf(maps ?? [])}
              zoom={zoom}
              onZoom={setZoom}
              label={names[i]!}
            >
              <figcaption>
                {names[i]}: {target.scores[i]!.toFixed(2)}, {tried.decisions[i]}
              </figcaption>
            </Picture>
          ))}
        </div>
        <div>
          <ScoreChart scores={tried.scores} />
          <p class="soft small">
            Scores of the classes that matter: <span class="mark">■</span> before, <span class="mark treated">■</span> after
            {tried.control && ", ○ control"}; beside them the change.
          </p>
        </div>
      </div>
      {!maps && <p class="soft small">The maps of this run were made elsewhere, so there is none of a changed picture.</p>}
    </section>
  );
}

/** Scores of the classes that matter, before and after, with their changes. */
export function ScoreChart({ scores }: { scores: Score[] }) {
  const all = scores.flatMap((one) => one.scores);
  const low = Math.min(0, ...all);
  const high = Math.max(0, ...all);
  const x = (value: number) => 120 + (300 * (value - low)) / (high - low || 1);
  const told = scores.map((one) => `${one.class}: ${one.scores[0]!.toFixed(2)} to ${one.scores[1]!.toFixed(2)}`).join("; ");
  const short = (name: string) => (name.length > 16 ? `${name.slice(0, 15)}…` : name);
  return (
    <div class="pfungst-chart scores">
      <svg viewBox={`0 0 520 ${34 * scores.length + 8}`} role="img" aria-label={`Scores. ${told}`}>
        <line class="axis" x1={x(0)} x2={x(0)} y1={2} y2={34 * scores.length + 4} />
        {scores.map((one, i) => (
          <g transform={`translate(0 ${6 + 34 * i})`}>
            <title>{`${one.class}: probability ${(100 * one.probabilities[0]!).toFixed(1)} % to ${(100 * one.probabilities[1]!).toFixed(1)} %`}</title>
            <text x={112} y={17} text-anchor="end" class={i === 0 ? "needed" : ""}>
              {short(one.class)}
            </text>
            {one.scores.slice(0, 2).map((value, k) => (
              <rect
                class={k ? "bar chosen" : "bar"}
                x={Math.min(x(0), x(value))}
                y={k ? 13 : 1}
                width={Math.max(1, Math.abs(x(value) - x(0)))}
                height={11}
                rx={2}
              />
            ))}
            {one.scores.length > 2 &&
              ["halo", "control"].map((kind) => <circle class={kind} cx={x(one.scores[2]!)} cy={18.5} r={4.5} />)}
            <text x={430} y={17}>
              {signed(one.scores[1]! - one.scores[0]!)}
            </text>
          </g>
        ))}
      </svg>
    </div>
  );
}
