// Two runs beside each other: findings kept, lost and gained, what else differs, and any sample in both.

import { useEffect, useState } from "preact/hooks";
import { get, type Finding, type Overview, type Verdict } from "./api";
import { Chart, Drawn } from "./finding";
import { ModeButtons, readLook } from "./look";
import { Picture, scaleOf, useMaps, WHOLE, type Look, type Zoom } from "./pictures";
import { go, type State } from "./state";

interface Kept {
  left: string;
  right: string;
  class: string;
  jaccard: number;
  verdicts: [Verdict, Verdict];
  changed: boolean;
  sizes: [number, number];
  places: [string, string];
  shared: number;
  in_both: [number, number]; // of each finding's pictures, those that both runs have
}

interface Lone {
  id: string;
  class: string;
  verdict: Verdict;
  size: number;
  place: string;
  in_both: number;
  nearest: { id: string; jaccard: number } | null;
}

interface Comparison {
  differences: { name: string; left: unknown; right: unknown }[];
  kept: Kept[];
  lost: Lone[];
  gained: Lone[];
  samples: {
    common: number;
    only: [number, number];
    changed: number;
    repaired: number;
    broken: number;
    accuracy: [number, number] | null;
    first: { id: string; label: string | null; decisions: [string, string]; rows: [number, number] }[];
  };
}

interface Sample {
  row: number;
  id: string;
  label: string | null;
  prediction: string | null;
  probability: number | null;
  class: string | null;
  score: number | null;
  finding: string | null;
}

const SIDES = ["left", "right"] as const;

export function CompareView({ runs, run, state }: { runs: Overview[]; run: number; state: State }) {
  const number = (name: string, other: number) => {
    const given = Number.parseInt(state.values[name] ?? "", 10);
    return given >= 0 && given < runs.length ? given : other;
  };
  const left = number("a", run < runs.length - 1 ? run : 0);
  const right = number("b", left === 0 ? 1 : 0);
  const [found, setFound] = useState<{ key: string; content: Comparison }>();
  const [failure, setFailure] = useState("");
  const key = `${left},${right}`;
  useEffect(() => {
    setFailure("");
    get<Comparison>(`compare?left=${left}&right=${right}`).then(
      (content) => setFound({ key, content }),
      (error: Error) => setFailure(error.message),
    );
  }, [key]);
  const content = found?.key === key ? found.content : undefined;
  useEffect(() => {
    document.querySelector(".listed[aria-current]")?.scrollIntoView({ block: "nearest" });
  }, [content, state.values["pair"]]);
  return (
    <div class={`split ${state.values["pair"] || state.values["sample"] ? "chosen" : ""}`}>
      <section class="list" aria-label="Two runs">
        <div class="filters">
          {SIDES.map((side, i) => (
            <label>
              {i ? "After" : "Before"}
              <select
                value={String(i ? right : left)}
                onChange={(event) => go({ values: { [i ? "b" : "a"]: event.currentTarget.value, pair: "", sample: "" } })}
              >
                {runs.map((one, k) => (
                  <option value={String(k)}>{one.name}</option>
                ))}
              </select>
            </label>
          ))}
        </div>
        {failure && <p class="failure">{failure}</p>}
        {content ? <Lists content={content} state={state} /> : !failure && <p class="waiting">Comparing …</p>}
      </section>
      <main class="page" tabIndex={-1} aria-label="Side by side">
        {content && <Beside key={key} content={content} pair={[left, right]} runs={runs} state={state} />}
      </main>
    </div>
  );
}

/** How many, how many of them confirmed, and how many of them pass the filter if not all do. */
function counted(verdicts: Verdict[], shown: number): string {
  const confirmed = verdicts.filter((one) => one === "confirmed").length;
  const told = confirmed ? `, ${confirmed} of them confirmed` : "";
  return `${verdicts.length}${told}${shown < verdicts.length ? ` (${shown} shown)` : ""}`;
}

const TITLES = { lost: "Lost", gained: "Gained", kept: "Kept" };

function Lists({ content, state }: { content: Comparison; state: State }) {
  const { text = "", only = "", pair = "" } = state.values;
  const passes = (words: string) => words.toLowerCase().includes(text.toLowerCase());
  const kept = content.kept.filter(
    (one) =>
      passes(`${one.left} ${one.right} ${one.class} ${one.places.join(" ")} ${one.verdicts.join(" ")}`) &&
      (!only || (only === "changed" ? one.changed : (one.verdicts as string[]).includes(only))),
  );
  const lone = (all: Lone[]) =>
    all.filter(
      (one) => passes(`${one.id} ${one.class} ${one.place} ${one.verdict}`) && (!only || only === "changed" || one.verdict === only),
    );
  return (
    <>
      <form class="filters" onSubmit={(event) => event.preventDefault()}>
        <label>
          Show
          <select value={only} onChange={(event) => go({ values: { only: event.currentTarget.value } }, true)}>
            <option value="">all</option>
            <option value="changed">what changed</option>
            {["confirmed", "open", "refuted"].map((one) => (
              <option value={one}>{one}</option>
            ))}
          </select>
        </label>
        <label>
          Search
          <input type="search" value={text} onInput={(event) => go({ values: { text: event.currentTarget.value } }, true)} />
        </label>
      </form>
      <ol>
        <Entry name="differences" pair={pair || "differences"}>
          <b>What differs</b>
          <span class="soft small">
            {content.differences.length} settings, digests, versions; {content.samples.changed} decisions
          </span>
        </Entry>
      </ol>
      {(["lost", "gained"] as const).map((kind) => (
        <section aria-label={TITLES[kind]}>
          <h3>
            {TITLES[kind]}: {counted(content[kind].map((one) => one.verdict), lone(content[kind]).length)}
          </h3>
          <ol>
            {lone(content[kind]).map((one) => (
              <Entry key={one.id} name={`${kind}:${one.id}`} pair={pair}>
                <span class="line">
                  <b>{one.id}</b>
                  <span class={`chip ${one.verdict}`}>{one.verdict}</span>
                </span>
                <span>
                  {one.class}: {one.place}
                </span>
                <span class="soft small">
                  {one.size} pictures
                  {one.in_both < one.size && `, ${one.in_both || "none"} of them in the other run`}
                  {one.nearest && `; most alike is ${one.nearest.id} of the other run (Jaccard ${one.nearest.jaccard.toFixed(2)})`}
                </span>
              </Entry>
            ))}
          </ol>
        </section>
      ))}
      <section aria-label={TITLES.kept}>
        <h3>
          {TITLES.kept}: {counted(content.kept.map((one) => one.verdicts[1]), kept.length)}
        </h3>
        <ol>
          {kept.map((one) => (
            <Entry key={one.left} name={`kept:${one.left}`} pair={pair}>
              <span class="line">
                <b>
                  {one.left} = {one.right}
                </b>
                <span class={`chip ${one.verdicts[0]}`}>{one.verdicts[0]}</span>
                {one.changed && (
                  <>
                    → <span class={`chip ${one.verdicts[1]}`}>{one.verdicts[1]}</span>
                  </>
                )}
              </span>
              <span>
                {one.class}: {one.places[1]}
              </span>
              <span class="soft small">
                {one.sizes[0]} and {one.sizes[1]} pictures, {one.shared} the same (Jaccard {one.jaccard.toFixed(2)}
                {one.sizes.some((size, i) => one.in_both[i]! < size) &&
                  ` of the ${one.in_both[0]} and ${one.in_both[1]} that both runs have`}
                )
              </span>
            </Entry>
          ))}
        </ol>
      </section>
      <p class="soft small">
        A finding is kept if both runs have one of the same class with much the same members. One that is lost is not
        shown to be repaired: its group may have fallen apart. <code>pfungst confirm RUN FINDING --model OTHER</code> asks
        the other model about the same pictures.
      </p>
    </>
  );
}

function Entry({ name, pair, children }: { name: string; pair: string; children: preact.ComponentChildren }) {
  return (
    <li>
      <button
        type="button"
        class="listed bare"
        aria-current={name === pair ? "true" : undefined}
        onClick={() => go({ values: { pair: name, sample: "" } })}
      >
        <span class="words">{children}</span>
      </button>
    </li>
  );
}

function Beside(props: {
  content: Comparison;
  pair: [number, number];
  runs: Overview[];
  state: State;
}) {
  const { content, pair, runs, state } = props;
  const chosen = state.values["pair"] ?? "";
  const sample = state.values["sample"] ?? "";
  const [kind, id] = chosen.split(":");
  const kept = content.kept.find((one) => one.left === id);
  const ids: [string, string] =
    kind === "kept" ? [id ?? "", kept?.right ?? ""] : kind === "lost" ? [id ?? "", ""] : ["", kind === "gained" ? (id ?? "") : ""];
  return (
    <article>
      <button type="button" class="plain back" onClick={() => go({ values: { pair: "", sample: "" } })}>
        ← both runs
      </button>
      <Samples content={content} sample={sample} pair={pair} runs={runs} state={state} />
      {ids.some(Boolean) && !sample && (
        <>
          <h2>
            {kind === "kept" ? `${ids[0]} = ${ids[1]}` : `${ids[0] || ids[1]}: ${kind}`}
          </h2>
          <div class="sides">
            {ids.map((one, i) =>
              one ? (
                <OneSide key={i} run={pair[i]!} name={runs[pair[i]!]!.name} id={one} state={state} />
              ) : (
                <Absent key={i} run={pair[i]!} name={runs[pair[i]!]!.name} other={pair[1 - i]!} id={ids[1 - i]!} state={state} />
              ),
            )}
          </div>
        </>
      )}
      {!ids.some(Boolean) && !sample && <Differences content={content} />}
    </article>
  );
}

/** One finding in its run. */
function OneSide({ run, name, id, state }: { run: number; name: string; id: string; state: State }) {
  const [finding, setFinding] = useState<Finding>();
  useEffect(() => {
    get<Finding>(`runs/${run}/findings/${id}`).then(setFinding, () => undefined);
  }, [run, id]);
  const rows = (finding?.exemplars ?? []).filter((row): row is number => row !== null);
  return (
    <section aria-label={name}>
      <h3>{name}</h3>
      {finding && (
        <>
          <p class="line">
            <button type="button" class="plain" onClick={() => go({ view: "findings", run, finding: id })}>
              {id}
            </button>
            <span class={`chip ${finding.verdict}`}>{finding.verdict}</span>
            <span class="soft small">{finding.head}</span>
          </p>
          <p>{finding.summary}</p>
          <div class="pictures three">
            <Drawn run={run} finding={finding} />
            <Row run={run} name={name} rows={rows} state={state} />
          </div>
          {finding.rule && <p class="soft small">{finding.rule}</p>}
          <Chart text={finding.chart} />
        </>
      )}
    </section>
  );
}

/** The members of a finding that this run has not: what its model looks at in them. */
function Absent({ run, name, other, id, state }: { run: number; name: string; other: number; id: string; state: State }) {
  const [rows, setRows] = useState<number[]>([]);
  useEffect(() => {
    const find = async () => {
      const finding = await get<Finding>(`runs/${other}/findings/${id}`);
      const asked = finding.exemplars.filter((row) => row !== null).join();
      const answer = await get<{ rows: (number | null)[] }>(`runs/${other}/rows?other=${run}&rows=${asked}`);
      setRows(answer.rows.filter((row): row is number => row !== null));
    };
    find().catch(() => setRows([]));
  }, [run, other, id]);
  return (
    <section aria-label={name}>
      <h3>{name}</h3>
      <p class="soft">
        No finding of this run has much the same members as {id}.{" "}
        {rows.length ? "The same pictures, with this run's maps:" : "Nor has it the same pictures."}
      </p>
      <div class="pictures three">
        <Row run={run} name={name} rows={rows} state={state} />
      </div>
    </section>
  );
}

function lookOf(state: State): Look {
  return { ...readLook(state, "overlay"), opacity: 0.9, same: true };
}

/** Samples of a run, with one zoom and one scale. */
function Row({ run, name, rows, state }: { run: number; name: string; rows: number[]; state: State }) {
  const [zoom, setZoom] = useState<Zoom>(WHOLE);
  const look = lookOf(state);
  const maps = useMaps(run, rows, look.mode !== "input");
  return (
    <>
      {rows.map((row, i) => (
        <Picture
          key={row}
          run={run}
          row={row}
          look={look}
          map={maps[i]}
          scale={scaleOf(maps)}
          zoom={zoom}
          onZoom={setZoom}
          label={`sample ${row} of ${name}`}
        />
      ))}
    </>
  );
}

/** Any sample, by id, in both runs; those with another decision are offered. */
function Samples(props: {
  content: Comparison;
  sample: string;
  pair: [number, number];
  runs: Overview[];
  state: State;
}) {
  const { samples } = props.content;
  const show = (id: string) => go({ values: { sample: id } });
  return (
    <section aria-label="A sample in both runs">
      <form
        class="line making"
        onSubmit={(event) => {
          event.preventDefault();
          show(String(new FormData(event.currentTarget).get("id") ?? ""));
        }}
      >
        <label class="soft small line wide">
          Sample
          <input type="text" name="id" list="changed" placeholder="its id, such as 9/0036.png" value={props.sample} />
        </label>
        <datalist id="changed">
          {samples.first.map((one) => (
            <option value={one.id}>
              {one.decisions[0]} → {one.decisions[1]}
            </option>
          ))}
        </datalist>
        <button type="submit">show in both</button>
        {props.sample && (
          <button type="button" onClick={() => show("")}>
            close
          </button>
        )}
      </form>
      {props.sample && <InBoth key={props.sample} id={props.sample} {...props} />}
    </section>
  );
}

function InBoth({ id, pair, runs, state }: { id: string; pair: [number, number]; runs: Overview[]; state: State }) {
  const [found, setFound] = useState<(Sample | undefined)[]>([undefined, undefined]);
  const [failures, setFailures] = useState(["", ""]);
  const [zoom, setZoom] = useState<Zoom>(WHOLE);
  useEffect(() => {
    pair.forEach((run, i) =>
      get<Sample>(`runs/${run}/row?id=${encodeURIComponent(id)}`).then(
        (one) => setFound((old) => old.map((known, k) => (k === i ? one : known))),
        (error: Error) => setFailures((old) => old.map((known, k) => (k === i ? error.message : known))),
      ),
    );
  }, [id]);
  const look = lookOf(state);
  const wanted = look.mode !== "input";
  const maps = [0, 1].map((i) => useMaps(pair[i]!, found[i] ? [found[i]!.row] : [], wanted)[0]);
  return (
    <>
      <div class="line tools">
        <ModeButtons mode={look.mode} />
        <span class="soft small">Each map has a scale of its own: scores of two models do not compare.</span>
      </div>
      <div class="sides two">
        {pair.map((run, i) => (
          <div>
            <h3>{runs[run]!.name}</h3>
            {failures[i] && <p class="failure">{failures[i]}</p>}
            {found[i] && (
              <Picture
                run={run}
                row={found[i]!.row}
                look={{ ...look, same: false }}
                map={maps[i]}
                scale={1}
                zoom={zoom}
                onZoom={setZoom}
                side={512}
                label={`${id} in ${runs[run]!.name}`}
              >
                <figcaption>
                  taken for <b>{found[i]!.prediction ?? "nothing: it could not be read"}</b>
                  {found[i]!.probability !== null && ` (${(100 * found[i]!.probability!).toFixed(0)} %)`}
                  {found[i]!.label !== null && `, labelled ${found[i]!.label}`}; score of {found[i]!.class ?? "–"}:{" "}
                  {found[i]!.score?.toFixed(2) ?? "–"}
                  {found[i]!.finding && `; in ${found[i]!.finding}`}
                </figcaption>
              </Picture>
            )}
          </div>
        ))}
      </div>
    </>
  );
}

function Differences({ content }: { content: Comparison }) {
  const { samples } = content;
  const told = (value: unknown) => {
    const text = typeof value === "string" ? value : value === undefined || value === null ? "–" : JSON.stringify(value);
    return text.length > 140 ? `${text.slice(0, 90)} … ${text.slice(-40)}` : text;
  };
  return (
    <>
      <h2>What differs</h2>
      <p>
        {samples.changed.toLocaleString("en")} of the {samples.common.toLocaleString("en")} samples that both runs have are
        taken for another class
        {samples.accuracy &&
          `; ${samples.repaired.toLocaleString("en")} became right, ${samples.broken.toLocaleString("en")} wrong (accuracy ${(100 * samples.accuracy[0]).toFixed(1)} % before, ${(100 * samples.accuracy[1]).toFixed(1)} % after)`}
        .
        {samples.only.some(Boolean) && ` ${samples.only[0]} samples are in the first run only, ${samples.only[1]} in the second.`}
      </p>
      {content.differences.length ? (
        <div class="scroll">
          <table class="words">
            <thead>
              <tr>
                <th scope="col">what</th>
                <th scope="col">before</th>
                <th scope="col">after</th>
              </tr>
            </thead>
            <tbody>
              {content.differences.map((one) => (
                <tr>
                  <th scope="row">{one.name}</th>
                  <td>{told(one.left)}</td>
                  <td>{told(one.right)}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      ) : (
        <p class="soft">Model, pictures, preset and settings are the same.</p>
      )}
      {samples.first.length > 0 && (
        <>
          <h3>
            Another decision{samples.changed > samples.first.length && ` (the first ${samples.first.length})`}
          </h3>
          <div class="scroll">
            <table class="words">
              <thead>
                <tr>
                  {["sample", "label", "before", "after"].map((name) => (
                    <th scope="col">{name}</th>
                  ))}
                </tr>
              </thead>
              <tbody>
                {samples.first.map((one) => (
                  <tr>
                    <th scope="row">
                      <button type="button" class="plain" onClick={() => go({ values: { sample: one.id } })}>
                        {one.id}
                      </button>
                    </th>
                    <td>{one.label ?? "–"}</td>
                    <td>{one.decisions[0]}</td>
                    <td>{one.decisions[1]}</td>
                  </tr>
                ))}
              </tbody>
            </table>
          </div>
        </>
      )}
    </>
  );
}
