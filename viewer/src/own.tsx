// Findings of one's own: a group of samples, kept in the run folder, and tested as those of the audit are.

import { useEffect, useState } from "preact/hooks";
import { ANSWERS, get, lastAnswer, post, remove, sampleUrl, type Evidence, type Finding, type Judgement, type Overview, type Verdict } from "./api";
import { Proof, Said } from "./finding";
import type { Model } from "./lab";

interface Own {
  name: string;
  class: string;
  note: string;
  rows: number[];
  result: {
    verdict: Verdict;
    p: number;
    reason: string;
    chart: string;
    suspicion: number;
    evidence: Evidence[];
    views: string[];
    where: { kind: string; place: string; area: number };
    exemplars: number[];
    before: string | null;
    others: number;
    model: { name: string; same: boolean };
  } | null;
  experiment?: Finding["experiment"];
  judgements: Judgement[];
  again: Finding["again"];
}

interface Job {
  name: string;
  running: boolean;
  step: string;
  done: number;
  total: number;
  failure: string;
}

interface All {
  own: Own[];
  job: Job | null;
}

/** "3, 7, 10-14" as numbers.  Throws where it is something else. */
export function readRows(text: string): number[] {
  return text
    .split(/[\s,;]+/)
    .filter(Boolean)
    .flatMap((part) => {
      const found = /^(\d+)(?:-(\d+))?$/.exec(part);
      if (!found) throw new Error(`${part} is no row and no range of rows such as 10-14`);
      const [first, last] = [Number(found[1]), Number(found[2] ?? found[1])];
      if (last < first || last - first > 1_000_000) throw new Error(`${part} is no range of rows`);
      return Array.from({ length: last - first + 1 }, (_, i) => first + i);
    });
}

/** Rows as short a text as can be. */
export function writeRows(rows: number[]): string {
  const parts: string[] = [];
  for (let i = 0; i < rows.length; ) {
    let end = i;
    while (end + 1 < rows.length && rows[end + 1] === rows[end]! + 1) end++;
    parts.push(end > i ? `${rows[i]}-${rows[end]}` : `${rows[i]}`);
    i = end + 1;
  }
  return parts.join(", ");
}

export function OwnFindings(props: {
  run: number;
  overview: Overview;
  model: Model | undefined;
  finding: Finding | undefined;
}) {
  const { run, model } = props;
  const [all, setAll] = useState<All>({ own: [], job: null });
  const [failure, setFailure] = useState("");
  const at = `runs/${run}/own`;
  const fail = (error: Error) => setFailure(error.message);
  const look = () => get<All>(at).then(setAll, fail);
  useEffect(() => void look(), [run]);
  const wanted = new URLSearchParams(location.hash.slice(1)).get("own");
  useEffect(() => {
    if (wanted) document.getElementById(`own-${wanted}`)?.scrollIntoView({ block: "center" });
  }, [wanted, all.own.length]);
  const running = all.job?.running ?? false;
  useEffect(() => {
    if (!running) return;
    const timer = setInterval(() => void look(), 500);
    return () => clearInterval(timer);
  }, [running]);
  const act = async (what: () => Promise<unknown>) => {
    setFailure("");
    try {
      await what();
    } catch (error) {
      fail(error as Error);
    }
    await look();
  };
  const may = model !== undefined && model.state !== "off" && model.state !== "failed";
  return (
    <section aria-label="Findings of your own">
      <h3>Findings of your own</h3>
      <Making finding={props.finding} onMake={(made) => act(() => post(at, made))} />
      {failure && (
        <p class="failure" role="alert">
          {failure}
        </p>
      )}
      {all.own.map((one) => (
        <section class="card" id={`own-${one.name}`} aria-label={one.name} key={one.name}>
          <div class="line">
            <b>{one.name}</b>
            <span>
              {one.rows.length} pictures of {one.class}
            </span>
            {one.result && <span class={`chip ${one.result.verdict}`}>{one.result.verdict}</span>}
            {lastAnswer(one) && <span class="chip judged">judged: {lastAnswer(one)}</span>}
            <button type="button" disabled={!may || running} onClick={() => void act(() => post(`${at}/${one.name}/confirm`, {}))}>
              {one.result ? "test again" : "test"}
            </button>
            <button type="button" disabled={running && all.job?.name === one.name} onClick={() => void act(() => remove(`${at}/${one.name}`))}>
              delete
            </button>
          </div>
          {all.job?.name === one.name && <Progress job={all.job} />}
          {one.note && <p>{one.note}</p>}
          <div class="thumbs">
            {(one.result?.exemplars ?? one.rows).slice(0, 8).map((row) => (
              <img src={sampleUrl(run, row, 96)} alt={`sample ${row}`} loading="lazy" />
            ))}
          </div>
          <div class="line judging" role="group" aria-label={`Your judgement of ${one.name}`}>
            {ANSWERS.map((answer) => {
              const said = lastAnswer(one) === answer;
              return (
                <button
                  type="button"
                  aria-pressed={said}
                  onClick={() => void act(() => post(`${at}/${one.name}/judgements`, { answer: said ? "withdrawn" : answer }))}
                >
                  {answer}
                </button>
              );
            })}
          </div>
          <Said judgements={one.judgements} />
          {one.result && <Tested run={run} own={one} result={one.result} />}
        </section>
      ))}
      {!may && all.own.length > 0 && <p class="soft small">To test them, the model is needed: see above.</p>}
    </section>
  );
}

function Progress({ job }: { job: Job }) {
  if (!job.running)
    return job.failure ? (
      <p class="failure" role="alert">
        Not tested: {job.failure}
      </p>
    ) : null;
  return (
    <p class="line" role="status">
      <progress max={job.total} value={job.done} /> {job.step} …
    </p>
  );
}

function Tested({ run, own, result }: { run: number; own: Own; result: NonNullable<Own["result"]> }) {
  return (
    <>
      <p class="soft small">
        Against {result.others} others of the class. Suspicion {result.suspicion.toFixed(2)}: how far apart the group is
        in the run's maps. This is a single test: nothing is corrected for the other groups that you, or the audit, have
        tested.{" "}
        {!result.model.same && `Asked was another model than the run's: ${result.model.name}. `}
        {result.before && `Another cause was tried before: ${result.before}.`}
      </p>
      <details>
        <summary>
          {result.where.place}: {result.reason}
        </summary>
        <Proof
          evidence={result.evidence}
          chart={result.chart}
          experiment={own.experiment ?? []}
          again={own.again}
          picture={(name) => `api/runs/${run}/own/${own.name}/pictures/${name}`}
        />
      </details>
    </>
  );
}

function Making(props: { finding: Finding | undefined; onMake: (made: object) => Promise<void> }) {
  const [name, setName] = useState("");
  const [rows, setRows] = useState("");
  const [wrong, setWrong] = useState("");
  const { finding } = props;
  return (
    <form
      class="line making"
      onSubmit={(event) => {
        event.preventDefault();
        try {
          const read = readRows(rows);
          setWrong("");
          void props.onMake({ name, rows: read }).then(() => setName(""));
        } catch (error) {
          setWrong((error as Error).message);
        }
      }}
    >
      <label class="soft small line">
        Name
        <input type="text" required maxLength={64} pattern="[A-Za-z0-9][A-Za-z0-9_\-]*" title="letters, digits, - and _" value={name} onInput={(event) => setName(event.currentTarget.value)} />
      </label>
      <label class="soft small line wide">
        Samples
        <input type="text" required placeholder="rows, such as 3, 7, 10-14" value={rows} onInput={(event) => setRows(event.currentTarget.value)} />
      </label>
      {finding && (
        <button type="button" onClick={() => setRows(writeRows(finding.rows))}>
          members of {finding.id}
        </button>
      )}
      <button type="submit">keep</button>
      {wrong && <span class="failure">{wrong}</span>}
    </form>
  );
}
