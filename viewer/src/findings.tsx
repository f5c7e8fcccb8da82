// Findings first: the ranked list, its filters and its keys; the page of the one that is looked at beside it.

import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { findingUrl, get, judge, lastAnswer, sampleUrl, type Answer, type Listed, type Overview } from "./api";
import { FindingPage } from "./finding";
import { go, type State } from "./state";

const ANSWERS: Record<string, Answer> = { c: "cheat", l: "legitimate", u: "unsure" };
const KEYS: [string, string][] = [
  ["j, k", "next, previous finding"],
  ["Enter", "to the page of the finding"],
  ["c, l, u", "it is a cheat, legitimate, or you are unsure"],
  ["n", "write a note"],
  ["z", "undo your last judgement"],
  ["/", "search"],
  ["?", "these keys"],
];

interface Said {
  finding: string;
  before: Answer | "";
}

export function FindingsView({ run, overview, state }: { run: number; overview: Overview; state: State }) {
  const [findings, setFindings] = useState<Listed[]>();
  const [torn, setTorn] = useState(0);
  const [failure, setFailure] = useState("");
  const [told, setTold] = useState("");
  const [noting, setNoting] = useState(false);
  const [helping, setHelping] = useState(false);
  const said = useRef<Said[]>([]);
  const search = useRef<HTMLInputElement>(null);
  const opening = useRef(false); // a dialog: letters typed before it is there are no keys
  const page = useRef<HTMLElement>(null);

  const read = () =>
    get<{ findings: Listed[]; torn: number }>(`runs/${run}/findings`).then(
      (answer) => {
        setFindings(answer.findings);
        setTorn(answer.torn);
      },
      (error: Error) => setFailure(error.message),
    );
  useEffect(() => {
    // The first event comes at once; later ones when somebody judges, in another tab or on the command line.
    const changes = new EventSource(`api/runs/${run}/changes`);
    changes.onmessage = () => void read();
    changes.onerror = () => void read();
    return () => changes.close();
  }, [run]);

  const { verdict = "", class: ofClass = "", least = "", text = "", said: judged = "" } = state.values;
  const shown = useMemo(
    () =>
      (findings ?? []).filter(
        (one) =>
          (!verdict || one.verdict === verdict) &&
          (!ofClass || one.class === ofClass) &&
          one.size >= (Number(least) || 0) &&
          (!judged || (lastAnswer(one) || "nothing") === judged) &&
          `${one.id} ${one.class} ${one.where.place} ${one.summary}`.toLowerCase().includes(text.toLowerCase()),
      ),
    [findings, verdict, ofClass, least, text, judged],
  );
  const chosen = findings?.find((one) => one.id === state.finding);
  const current = chosen ?? shown[0];

  const sending = useRef<Promise<unknown>>(Promise.resolve()); // one after the other: the last one said is the last kept
  const newest = useRef(new Map<string, ReturnType<typeof lastAnswer>>()); // keys come sooner than the page is drawn anew
  const waiting = useRef(0);
  useEffect(() => {
    if (!waiting.current) newest.current.clear(); // what is drawn is the newest, another tab's answers too
  }, [findings]);
  const answer = async (finding: Listed, what: Answer, note = "", undoing = false) => {
    const before = newest.current.has(finding.id) ? newest.current.get(finding.id)! : lastAnswer(finding);
    if (!undoing) said.current.push({ finding: finding.id, before });
    newest.current.set(finding.id, what === "withdrawn" ? "" : what);
    waiting.current++;
    try {
      const saved = sending.current.catch(() => {}).then(() => judge(run, finding.id, what, note));
      sending.current = saved;
      const now = await saved.finally(() => waiting.current--);
      setFindings((old) => old?.map((one) => (one.id === now.id ? now : one)));
      setTold(undoing ? `${finding.id}: taken back` : `${finding.id}: ${what}, saved`);
    } catch (error) {
      if (!undoing) said.current.pop();
      newest.current.set(finding.id, before);
      setTold(`${finding.id}: not saved: ${(error as Error).message}`);
    }
  };
  const undo = () => {
    const last = said.current.pop();
    const finding = last && findings?.find((one) => one.id === last.finding);
    if (last && finding) void answer(finding, last.before || "withdrawn", "", true);
    else setTold("nothing to undo");
  };
  const step = (by: number) => {
    const at = shown.findIndex((one) => one.id === current?.id);
    const next = shown[Math.min(shown.length - 1, Math.max(0, at + by))];
    if (next) go({ finding: next.id }, true);
  };

  useEffect(() => {
    const press = (event: KeyboardEvent) => {
      const target = event.target as HTMLElement;
      if (event.key === "Escape") {
        setNoting(false);
        setHelping(false);
        target.blur();
        return;
      }
      if (opening.current || document.querySelector("dialog")) return;
      if (target.closest("input[type=text], input[type=search], input[type=number], textarea, select, dialog")) return;
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const what = ANSWERS[event.key];
      if (what && current) void answer(current, what);
      else if (event.key === "j") step(1);
      else if (event.key === "k") step(-1);
      else if (event.key === "z") undo();
      else if (event.key === "n" && current) {
        opening.current = true;
        setNoting(true);
      }
      else if (event.key === "/") search.current?.focus();
      else if (event.key === "?") setHelping(true);
      else if (event.key === "Enter" && current && !target.closest("button, a, summary")) page.current?.focus();
      else return;
      event.preventDefault();
    };
    addEventListener("keydown", press);
    return () => removeEventListener("keydown", press);
  });
  useEffect(() => {
    opening.current = false;
  }, [noting]);
  useEffect(() => {
    document.querySelector(".listed[aria-current]")?.scrollIntoView({ block: "nearest" });
  }, [current?.id]);

  if (failure && !findings) return <p class="failure">{failure}</p>;
  if (!findings) return <p class="waiting">Loading …</p>;
  const classes = [...new Set(findings.map((one) => one.class))].sort();
  return (
    <div class={`split ${chosen ? "chosen" : ""}`}>
      <section class="list" aria-label="Findings">
        <h1>{overview.headline}</h1>
        {overview.recognition &&
          (overview.recognition.warning ? (
            <details class="doubt small">
              <summary>Look at this first</summary>
              {overview.recognition.warning}
            </details>
          ) : (
            <p class="soft small">{overview.recognition.text}</p>
          ))}
        {torn > 0 && <p class="failure">{torn} lines of judgements.jsonl cannot be read.</p>}
        <form class="filters" onSubmit={(event) => event.preventDefault()}>
          <Choice name="verdict" label="Verdict" value={verdict} options={["confirmed", "open", "refuted"]} />
          <Choice name="class" label="Class" value={ofClass} options={classes} />
          <Choice name="said" label="Judged" value={judged} options={["cheat", "legitimate", "unsure", "nothing"]} />
          <label>
            At least … pictures
            <input
              type="number"
              min="0"
              value={least}
              onInput={(event) => go({ values: { least: event.currentTarget.value } }, true)}
            />
          </label>
          <label class="wide">
            Search
            <input
              type="search"
              ref={search}
              value={text}
              onInput={(event) => go({ values: { text: event.currentTarget.value } }, true)}
            />
          </label>
        </form>
        <p class="soft small" role="status">
          {shown.length} of {findings.length} findings
          {overview.untested > 0 && `; ${overview.untested} more groups were not tested (--max-findings)`}
          {told && ` · ${told}`}
        </p>
        <ol>
          {shown.map((one) => (
            <li key={one.id}>
              <button
                type="button"
                class="listed"
                aria-current={one.id === current?.id ? "true" : undefined}
                onClick={() => go({ finding: one.id })}
              >
                <Summary run={run} finding={one} />
              </button>
            </li>
          ))}
        </ol>
        <button type="button" class="plain" onClick={() => setHelping(true)}>
          Keys (?)
        </button>
      </section>
      <main class="page" tabIndex={-1} ref={page} aria-label="Finding">
        {current ? (
          <FindingPage
            key={current.id}
            run={run}
            listed={current}
            state={state}
            onAnswer={(what) => void answer(current, what)}
            onNote={() => setNoting(true)}
            onUndo={undo}
          />
        ) : (
          <p class="soft">{findings.length ? "No finding passes these filters." : "This run has no findings."}</p>
        )}
      </main>
      {noting && current && (
        <NoteDialog
          finding={current}
          onClose={() => setNoting(false)}
          onSave={(note, what) => {
            setNoting(false);
            void answer(current, what, note);
          }}
        />
      )}
      {helping && (
        <Dialog title="Keys" onClose={() => setHelping(false)}>
          <dl class="keys">
            {KEYS.map(([key, text]) => (
              <>
                <dt>
                  <kbd>{key}</kbd>
                </dt>
                <dd>{text}</dd>
              </>
            ))}
          </dl>
        </Dialog>
      )}
    </div>
  );
}

function Choice(props: { name: string; label: string; value: string; options: string[] }) {
  return (
    <label>
      {props.label}
      <select
        value={props.value}
        onChange={(event) => go({ values: { [props.name]: event.currentTarget.value } }, true)}
      >
        <option value="">all</option>
        {props.options.map((one) => (
          <option value={one}>{one}</option>
        ))}
      </select>
    </label>
  );
}

function Summary({ run, finding }: { run: number; finding: Listed }) {
  const answer = lastAnswer(finding);
  return (
    <>
      <img class="mean" src={findingUrl(run, finding.id, "mean")} alt="" loading="lazy" />
      <span class="words">
        <span class="line">
          <b>{finding.id}</b>
          <span class={`chip ${finding.verdict}`}>{finding.verdict}</span>
          {answer && <span class="chip judged">{answer}</span>}
        </span>
        <span>
          {finding.class}: {finding.where.place}
        </span>
        <span class="soft small">
          {finding.size} pictures, {(100 * finding.prevalence).toFixed(0)} % of those recognised as {finding.class}
        </span>
        <span class="thumbs">
          {finding.exemplars.slice(0, 3).map(
            (row) => row !== null && <img src={sampleUrl(run, row, 96)} alt="" loading="lazy" />,
          )}
        </span>
      </span>
    </>
  );
}

export function Dialog(props: { title: string; onClose: () => void; children: preact.ComponentChildren }) {
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => {
    if (!dialog.current?.open) dialog.current?.showModal();
  }, []);
  return (
    <dialog ref={dialog} onClose={props.onClose} aria-label={props.title}>
      <h2>{props.title}</h2>
      {props.children}
      <button type="button" onClick={props.onClose}>
        Close
      </button>
    </dialog>
  );
}

const drafts = new Map<string, string>(); // notes that were closed unsaved, by finding

function NoteDialog(props: { finding: Listed; onClose: () => void; onSave: (note: string, what: Answer) => void }) {
  const [note, setNote] = useState(drafts.get(props.finding.id) ?? props.finding.judgements.at(-1)?.note ?? "");
  const [what, setWhat] = useState<Answer>(lastAnswer(props.finding) || "unsure");
  return (
    <Dialog title={`Note on ${props.finding.id}`} onClose={props.onClose}>
      <form
        method="dialog"
        onSubmit={(event) => {
          event.preventDefault();
          drafts.delete(props.finding.id);
          props.onSave(note, what);
        }}
      >
        <label class="wide">
          Why, in words
          <textarea
            rows={4}
            maxLength={10000}
            value={note}
            onInput={(event) => {
              setNote(event.currentTarget.value);
              drafts.set(props.finding.id, event.currentTarget.value);
            }}
            onKeyDown={(event) => {
              if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) event.currentTarget.form?.requestSubmit();
            }}
          />
        </label>
        <label>
          It is
          <select value={what} onChange={(event) => setWhat(event.currentTarget.value as Answer)}>
            {Object.values(ANSWERS).map((one) => (
              <option value={one}>{one}</option>
            ))}
          </select>
        </label>
        <button type="submit">
          Save <kbd>Ctrl Enter</kbd>
        </button>
      </form>
    </Dialog>
  );
}
