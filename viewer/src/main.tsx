// The page: the head with the runs, the views, and what all of them share.

import { render } from "preact";
import { useEffect, useState } from "preact/hooks";
import { get, type Overview } from "./api";
import { CompareView } from "./compare";
import { FindingsView } from "./findings";
import { LabView } from "./lab";
import { MapView } from "./map";
import { go, useAddress, type State } from "./state";

/** What is shown of a run; `least`: only where so many runs are shown. */
const VIEWS: Record<string, { title: string; show: (props: ViewProps) => preact.JSX.Element; least?: number }> = {
  findings: { title: "Findings", show: FindingsView },
  map: { title: "Map", show: MapView },
  try: { title: "Try it", show: LabView },
  compare: { title: "Compare", show: CompareView, least: 2 },
};

interface ViewProps {
  run: number;
  runs: Overview[];
  overview: Overview;
  state: State;
}

function Head({ runs, run, view }: { runs: Overview[]; run: number; view: string }) {
  const now = runs[run]!;
  return (
    <header class="head">
      <div class="title">
        {runs.length > 1 ? (
          <select
            aria-label="Run"
            value={String(run)}
            onChange={(event) => go({ run: Number(event.currentTarget.value), finding: "" })}
          >
            {runs.map((one, i) => (
              <option value={String(i)}>{one.name}</option>
            ))}
          </select>
        ) : (
          <strong>{now.name}</strong>
        )}
        <span class="soft">
          {now.model} on {now.samples.toLocaleString("en")} pictures
        </span>
      </div>
      <nav aria-label="Views">
        {offered(runs).map(([name, one]) => (
          <button type="button" aria-current={name === view ? "page" : undefined} onClick={() => go({ view: name })}>
            {one.title}
          </button>
        ))}
      </nav>
    </header>
  );
}

function offered(runs: Overview[]) {
  return Object.entries(VIEWS).filter(([, one]) => runs.length >= (one.least ?? 1));
}

function Page() {
  const state = useAddress();
  const [runs, setRuns] = useState<Overview[]>();
  const [failure, setFailure] = useState("");
  useEffect(() => {
    get<Overview[]>("runs").then(setRuns, (error: Error) => setFailure(error.message));
  }, []);
  if (failure) return <p class="failure">{failure}</p>;
  if (!runs) return <p class="waiting">Loading …</p>;
  const run = Math.min(state.run, runs.length - 1);
  const view = offered(runs).some(([name]) => name === state.view) ? state.view : "findings";
  const Show = VIEWS[view]!.show;
  return (
    <>
      <Head runs={runs} run={run} view={view} />
      <Show key={run} run={run} runs={runs} overview={runs[run]!} state={state} />
    </>
  );
}

// The token has done its work (a cookie has taken its place); it should not stand in pictures of the screen.
if (new URLSearchParams(location.search).has("token")) history.replaceState(null, "", location.pathname + location.hash);
render(<Page />, document.getElementById("page")!);
