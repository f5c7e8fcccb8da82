// Try it: paint a region on a picture, cut it or paste it on another one, and see at once what the model makes of it.

import { useEffect, useRef, useState } from "preact/hooks";
import { findingUrl, get, post, relevanceOf, sampleUrl, type Finding, type Listed, type Overview } from "./api";
import { Easel } from "./easel";
import { copyMask, countOn, emptyMask, fromPicture, strongest, toRuns, type Mask } from "./masks";
import { OwnFindings } from "./own";
import { go, type State } from "./state";
import { Result, type Tried } from "./tried";

export interface Model {
  state: "off" | "asleep" | "loading" | "ready" | "failed";
  failure: string;
  busy: string;
  model: string;
  same: boolean;
  exact: boolean; // whether the run's pictures are what this model gets
  device: string;
  seconds: number;
  size: [number, number];
  classes: string[];
}

const CUTS: Record<string, string> = {
  "cut:colour": "the colours around it",
  "cut:inpaint": "an inpainting",
  "cut:blur": "a blur",
  "cut:noise": "noise",
};
const STRIP = 12;

export function LabView({ run, overview, state }: { run: number; overview: Overview; state: State }) {
  const model = useModel(run);
  const [findings, setFindings] = useState<Listed[]>([]);
  const [finding, setFinding] = useState<Finding>();
  const [failure, setFailure] = useState("");
  useEffect(() => {
    const fail = (error: Error) => setFailure(error.message);
    get<{ findings: Listed[] }>(`runs/${run}/findings`).then((answer) => setFindings(answer.findings), fail);
  }, [run]);
  const chosen = findings.find((one) => one.id === state.finding) ?? findings[0];
  useEffect(() => {
    if (!chosen) return;
    get<Finding>(`runs/${run}/findings/${chosen.id}`).then(setFinding, (error: Error) => setFailure(error.message));
  }, [run, chosen?.id]);
  const named = state.values["row"];
  const row = Math.min(overview.samples - 1, Math.max(0, named ? Number.parseInt(named, 10) || 0 : (finding?.rows[0] ?? 0)));
  const size = model?.state === "ready" ? model.size : undefined;
  return (
    <main class="page" aria-label="Try it">
      <article>
        <ModelLine model={model} run={run} />
        {failure && <p class="failure">{failure}</p>}
        <section aria-label="Sample">
          <div class="line">
            <label class="soft small line">
              Sample
              <input
                type="number"
                min="0"
                max={overview.samples - 1}
                value={row}
                onChange={(event) => go({ values: { row: event.currentTarget.value } })}
              />
            </label>
            {findings.length > 0 && (
              <label class="soft small line">
                or a member of
                <select
                  value={chosen?.id}
                  onChange={(event) => go({ finding: event.currentTarget.value, values: { row: "" } })}
                >
                  {findings.map((one) => (
                    <option value={one.id}>
                      {one.id}, {one.class}: {one.verdict}
                    </option>
                  ))}
                </select>
              </label>
            )}
          </div>
          {finding && (
            <Strip
              run={run}
              rows={finding.rows.slice(0, 2 * STRIP)}
              chosen={row}
              label={`Members of ${finding.id}`}
              onChoose={(one) => go({ values: { row: String(one) } })}
            />
          )}
        </section>
        {size && (finding || !findings.length) && (
          <Bench key={`${run}/${row}`} run={run} row={row} size={size} finding={finding} state={state} model={model!} />
        )}
        <OwnFindings run={run} overview={overview} model={model} finding={finding} />
      </article>
    </main>
  );
}

/** The run's model: asked to load when this view is opened, and looked at until it is there. */
function useModel(run: number): Model | undefined {
  const [model, setModel] = useState<Model>();
  useEffect(() => {
    let alive = true;
    const look = async () => {
      while (alive) {
        let now: Model;
        try {
          now = await get<Model>(`runs/${run}/model`);
          if (now.state === "asleep") now = (await (await post(`runs/${run}/model`, {})).json()) as Model;
        } catch (error) {
          now = { state: "failed", failure: (error as Error).message } as Model;
        }
        if (alive) setModel(now);
        if (now.state !== "loading") return;
        await new Promise((done) => setTimeout(done, 300));
      }
    };
    void look();
    return () => {
      alive = false;
    };
  }, [run]);
  return model;
}

function ModelLine({ model, run }: { model: Model | undefined; run: number }) {
  if (!model || model.state === "loading" || model.state === "asleep")
    return (
      <p class="soft" role="status">
        The model is loaded …
      </p>
    );
  if (model.state === "off")
    return (
      <p>
        To cut and paste, the model is needed, and it is loaded only if you ask for it: start{" "}
        <code>pfungst view RUN --model</code>, or <code>--model SPEC --weights FILE</code> where the run's model was
        passed from Python, or to ask another one.
      </p>
    );
  if (model.state === "failed")
    return (
      <p class="failure" role="alert">
        The model cannot be loaded: {model.failure}{" "}
        <button type="button" onClick={() => post(`runs/${run}/model`, {}).then(() => location.reload())}>
          try again
        </button>
      </p>
    );
  return (
    <p class="soft" role="status">
      Asked is {model.model}, {model.same ? "the run's own model" : <b class="open">another model than the run's</b>}, on{" "}
      {model.device} (loaded in {model.seconds.toFixed(1)} s).
    </p>
  );
}

function Strip(props: {
  run: number;
  rows: number[];
  chosen: number;
  label: string;
  titles?: string[];
  onChoose: (row: number) => void;
}) {
  return (
    <div class="strip" role="group" aria-label={props.label}>
      {props.rows.map((row, i) => (
        <button
          type="button"
          aria-pressed={row === props.chosen}
          aria-label={`sample ${row}${props.titles ? `, ${props.titles[i]}` : ""}`}
          title={`sample ${row}${props.titles ? `, ${props.titles[i]}` : ""}`}
          onClick={() => props.onChoose(row)}
        >
          <img src={sampleUrl(props.run, row, 96, "input")} alt="" loading="lazy" />
        </button>
      ))}
    </div>
  );
}

interface Others {
  class: string;
  others: { row: number; class: string }[];
}

function Bench(props: {
  run: number;
  row: number;
  size: [number, number];
  finding: Finding | undefined;
  state: State;
  model: Model;
}) {
  const { run, row, finding, state, model } = props;
  const [mask, setMask] = useState<Mask>(() => emptyMask(...props.size));
  const [before, setBefore] = useState<Mask[]>([]); // for undo
  const [share, setShare] = useState(8);
  const [drawn, setDrawn] = useState(0);
  const [others, setOthers] = useState<Others>();
  const [busy, setBusy] = useState(false);
  const [failure, setFailure] = useState("");
  const [result, setResult] = useState<{ tried: Tried; what: string; seconds: number }>();
  const outcome = useRef<HTMLDivElement>(null);
  const { cut = "cut:colour", target = "" } = state.values;
  const onto = Number(state.values["onto"] || (others?.others[0]?.row ?? -1));
  useEffect(() => {
    get<Others>(`runs/${run}/samples/${row}/others?count=${STRIP}&seed=${drawn}`).then(setOthers, (error: Error) =>
      setFailure(error.message),
    );
  }, [run, row, drawn]);

  const put = (next: Mask) => {
    setBefore([...before.slice(-49), mask]);
    setMask(next);
  };
  const start = async (how: (next: Mask) => Promise<void> | void) => {
    const next = copyMask(mask);
    try {
      await how(next);
      put(next);
    } catch (error) {
      setFailure((error as Error).message);
    }
  };
  const undo = before.length
    ? () => {
        setMask(before.at(-1)!);
        setBefore(before.slice(0, -1));
      }
    : undefined;
  const ask = async (change: string, what: string) => {
    setBusy(true);
    setFailure("");
    const begun = performance.now();
    const body = { row, change, region: toRuns(mask), ...(change === "paste" ? { onto } : {}), ...(target ? { target: Number(target) } : {}) };
    try {
      const tried = (await (await post(`runs/${run}/try`, body)).json()) as Tried;
      setResult({ tried, what, seconds: (performance.now() - begun) / 1000 });
      requestAnimationFrame(() => outcome.current?.scrollIntoView({ block: "nearest" }));
    } catch (error) {
      setFailure((error as Error).message);
    }
    setBusy(false);
  };
  const src = model.exact ? sampleUrl(run, row, 512, "input") : `api/runs/${run}/samples/${row}/input`;
  const painted = countOn(mask);
  const region = finding && finding.where.kind === "fixed";
  return (
    <div class="bench">
        <section aria-label="Region">
          <h3>Paint a region</h3>
          <Easel src={src} label={`sample ${row}`} mask={mask} onMask={put} undo={undo} />
          <div class="line">
            <button type="button" disabled={!undo} onClick={undo}>
              undo
            </button>
            <button type="button" disabled={!painted} onClick={() => void start((next) => void next.on.fill(0))}>
              clear
            </button>
            {region && (
              <button type="button" onClick={() => void start((next) => fromPicture(next, findingUrl(run, finding.id, "mask")))}>
                region of {finding.id}
              </button>
            )}
            <button type="button" onClick={() => void start(async (next) => strongest(next, await relevanceOf(run, row), share / 100))}>
              strongest part of the map
            </button>
            <label class="soft small line">
              <input
                type="number"
                min="1"
                max="90"
                aria-label="How much of the picture, in percent"
                value={share}
                onInput={(event) => setShare(Math.min(90, Math.max(1, Number(event.currentTarget.value) || 8)))}
              />
              %
            </label>
          </div>
        </section>
        <section aria-label="Change">
          <h3>Cut it</h3>
          <div class="line">
            <label class="soft small line">
              to
              <select value={cut} onChange={(event) => go({ values: { cut: event.currentTarget.value } }, true)}>
                {Object.entries(CUTS).map(([name, title]) => (
                  <option value={name}>{title}</option>
                ))}
              </select>
            </label>
            <button type="button" class="main" disabled={!painted || busy} onClick={() => void ask(cut, `Cut to ${CUTS[cut] ?? cut}`)}>
              Cut
            </button>
          </div>
          <h3>Or paste it on a picture of another class</h3>
          {others && (
            <Strip
              run={run}
              rows={others.others.map((one) => one.row)}
              titles={others.others.map((one) => one.class)}
              chosen={onto}
              label="Pictures of other classes"
              onChoose={(one) => go({ values: { onto: String(one) } }, true)}
            />
          )}
          <div class="line">
            <button type="button" onClick={() => setDrawn(drawn + 1)}>
              other pictures
            </button>
            <label class="soft small line">
              or sample
              <input
                type="number"
                min="0"
                value={onto}
                onChange={(event) => go({ values: { onto: event.currentTarget.value } }, true)}
              />
            </label>
            <button type="button" class="main" disabled={!painted || busy || onto < 0} onClick={() => void ask("paste", `Pasted on sample ${onto}`)}>
              Paste
            </button>
          </div>
          <p>
            <label class="soft small line">
              Explained is the score of
              <select value={target} onChange={(event) => go({ values: { target: event.currentTarget.value } }, true)}>
                <option value="">{others?.class ?? "its class"}</option>
                {model.classes.map((name, i) => name !== others?.class && <option value={String(i)}>{name}</option>)}
              </select>
            </label>
          </p>
          <p role="status" class={failure ? "failure" : "soft"}>
            {busy ? "The model is asked …" : failure || (painted ? "" : "Paint a region first.")}
          </p>
          <div ref={outcome}>{result && <Result run={run} row={row} state={state} {...result} />}</div>
          <p class="soft small">
            One picture is an anecdote: an effect counts when it goes beyond that of its control, on many pictures. Make
            the group a finding of your own, below, and let it be tested.
          </p>
        </section>
    </div>
  );
}
