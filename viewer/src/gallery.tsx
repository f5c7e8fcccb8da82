// The pictures of a selection, some at a time, and ways to take it elsewhere.

import { useEffect, useState } from "preact/hooks";
import { post } from "./api";
import { ModeButtons, Pager, PaletteChoice, readLook } from "./look";
import { fetchFacts, type Facts } from "./mapdata";
import { Picture, scaleOf, useMaps, WHOLE } from "./pictures";
import { go, type State } from "./state";

const AT_ONCE = 24;
const FORMATS: [string, string][] = [
  ["csv", "CSV"],
  ["parquet", "Parquet"],
  ["json", "JSON"],
  ["zip", "pictures (zip)"],
];

export function tell(one: Facts): string {
  const said = one.prediction === null ? "not read" : `taken for ${one.prediction}`;
  const sure = one.probability === null ? "" : ` (${(100 * one.probability).toFixed(0)} %)`;
  return `${one.label ?? "no label"}, ${said}${sure}${one.findings.map((name) => `, ${name}`).join("")}`;
}

export function Gallery(props: {
  run: number;
  rows: Uint32Array;
  id: string; // of the selection on the server; "" while it is being kept
  state: State;
  onMark: (row: number | undefined) => void;
  onClear: () => void;
}) {
  const { run, rows, id, state } = props;
  const [zoom, setZoom] = useState(WHOLE);
  const [facts, setFacts] = useState<{ key: string; told: Facts[] }>({ key: "", told: [] });
  const wanted = readLook(state, "input");
  const last = Math.max(0, Math.ceil(rows.length / AT_ONCE) - 1);
  const page = Math.min(last, Math.max(0, Number(state.values["from"]) || 0));
  const first = page * AT_ONCE;
  const shown = Array.from(rows.subarray(first, first + AT_ONCE));
  const maps = useMaps(run, shown, wanted.mode !== "input");
  const key = shown.join();
  useEffect(() => {
    if (shown.length) fetchFacts(run, shown).then((told) => setFacts({ key, told }), () => undefined);
  }, [run, key]);
  const most = scaleOf(maps);
  return (
    <section class="gallery" aria-label="Selection">
      <div class="line">
        <h3>{rows.length.toLocaleString("en")} selected</h3>
        <button type="button" onClick={props.onClear}>
          clear <kbd>Esc</kbd>
        </button>
        <span class="line" role="group" aria-label="Export the selection">
          <span class="soft small">as</span>
          {FORMATS.map(([format, title]) =>
            id ? (
              <a class="button" href={`api/runs/${run}/selections/${id}/export?format=${format}`} download>
                {title}
              </a>
            ) : (
              <span class="button soft">{title}</span>
            ),
          )}
        </span>
      </div>
      <KeepOwn run={run} rows={rows} />
      <div class="line">
        <ModeButtons mode={wanted.mode} />
        {wanted.mode !== "input" && <PaletteChoice palette={wanted.palette} />}
        <Pager name="from" page={page} each={AT_ONCE} count={rows.length} />
      </div>
      <div class="pictures">
        {shown.map((row, i) => {
          const told = facts.key === key ? facts.told[i] : undefined;
          return (
            <div
              class="one"
              key={row}
              tabIndex={0}
              onFocus={() => props.onMark(row)}
              onBlur={() => props.onMark(undefined)}
              onMouseEnter={() => props.onMark(row)}
              onMouseLeave={() => props.onMark(undefined)}
            >
              <Picture run={run} row={row} look={wanted} map={maps[i]} scale={most} zoom={zoom} onZoom={setZoom} label={told?.id ?? `sample ${row}`}>
                {told && (
                  <figcaption title={told.id}>
                    <span class="soft">{row}</span> {tell(told)}
                  </figcaption>
                )}
              </Picture>
            </div>
          );
        })}
      </div>
    </section>
  );
}

/** The selection as a finding of one's own, which can be tested by experiment. */
function KeepOwn({ run, rows }: { run: number; rows: Uint32Array }) {
  const [name, setName] = useState("");
  const [told, setTold] = useState("");
  const keep = async () => {
    try {
      await post(`runs/${run}/own`, { name: name.trim(), rows: Array.from(rows) });
      go({ view: "try", values: { own: name.trim() } });
    } catch (error) {
      setTold((error as Error).message);
    }
  };
  return (
    <form
      class="line"
      onSubmit={(event) => {
        event.preventDefault();
        void keep();
      }}
    >
      <input
        aria-label="Name of a finding of your own"
        placeholder="name"
        maxLength={64}
        pattern="[A-Za-z0-9_\-]+"
        title="letters, digits, - and _"
        value={name}
        onInput={(event) => setName(event.currentTarget.value)}
      />
      <button type="submit" disabled={!name.trim()}>
        make it a finding of your own
      </button>
      {told && (
        <span class="failure small" role="status">
          {told}
        </span>
      )}
    </form>
  );
}
