// The page: the head with the runs, the views, and what all of them share.

import { render } from "preact";
import { useEffect, useState } from "preact/hooks";
import { get, type Overview } from "./api";
import { FindingsView } from "./findings";
import { MapView } from "./map";
import { go, useAddress } from "./state";

const VIEWS: Record<string, { title: string; show: typeof FindingsView }> = {
  findings: { title: "Findings", show: FindingsView },
  map: { title: "Map", show: MapView },
};

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
        {Object.entries(VIEWS).map(([name, one]) => (
          <button type="button" aria-current={name === view ? "page" : undefined} onClick={() => go({ view: name })}>
            {one.title}
          </button>
        ))}
      </nav>
    </header>
  );
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
  const view = state.view in VIEWS ? state.view : "findings";
  const Show = VIEWS[view]!.show;
  return (
    <>
      <Head runs={runs} run={run} view={view} />
      <Show key={run} run={run} overview={runs[run]!} state={state} />
    </>
  );
}

// The token has done its work (a cookie has taken its place); it should not stand in pictures of the screen.
if (new URLSearchParams(location.search).has("token")) history.replaceState(null, "", location.pathname + location.hash);
render(<Page />, document.getElementById("page")!);
