// Which map is shown, and how far it is where it has to be computed first.

import { useEffect, useState } from "preact/hooks";
import { get, post, remove } from "./api";
import { fetchPoints, type Columns, type Layouts, type Progress } from "./mapdata";
import { go } from "./state";

const TITLES: Record<string, string> = {
  all: "all classes side by side",
  tsne: "t-SNE of a class",
  spectral: "spectral axes of a class",
  umap: "UMAP of a class",
  pair: "two columns",
};
const ASKED = 400; // milliseconds between looks at the progress

export interface Layout {
  id: string;
  points: Float32Array | undefined;
  progress: Progress | undefined;
  failure: string;
  start: () => void;
  stop: () => void;
}

/** The map of this id, or the one that is shown at first; asked for until it is there. */
export function useLayout(run: number, known: Columns, layouts: Layouts, given: string): Layout {
  const id = given || (layouts.cells.length ? "all" : defaultPair(known));
  const [found, setFound] = useState<{ id: string; points: Float32Array }>();
  const [progress, setProgress] = useState<{ id: string; now: Progress }>();
  const [failure, setFailure] = useState("");
  const [again, setAgain] = useState(0);
  useEffect(() => {
    let alive = true;
    let timer = 0;
    setFailure("");
    const ask = async () => {
      try {
        const now = await get<Progress>(`runs/${run}/layouts/${id}`);
        if (!alive) return;
        setProgress({ id, now });
        if (now.state === "ready") {
          const points = await fetchPoints(run, known.version, id);
          if (alive) setFound({ id, points });
        } else if (now.state === "working") timer = window.setTimeout(() => void ask(), ASKED);
      } catch (error) {
        if (alive) setFailure((error as Error).message);
      }
    };
    void ask();
    return () => {
      alive = false;
      clearTimeout(timer);
    };
  }, [run, id, again]);
  const act = async (work: Promise<unknown>) => {
    try {
      await work;
      setAgain((count) => count + 1);
    } catch (error) {
      setFailure((error as Error).message);
    }
  };
  const path = `runs/${run}/layouts/${id}`;
  return {
    id,
    points: found?.id === id ? found.points : undefined,
    progress: progress?.id === id ? progress.now : undefined,
    failure,
    start: () => void act(post(path, {})),
    stop: () => void act(remove(path)),
  };
}

function pair(known: Columns, x: string, y: string): string {
  const place = (name: string) => Math.max(0, known.columns.findIndex((one) => one.name === name));
  return `pair:${place(x)}:${place(y)}`;
}

function defaultPair(known: Columns): string {
  const numbers = known.columns.filter((one) => one.kind === "number").map((one) => one.name);
  const first = ["probability", "outlier", "score"].filter((name) => numbers.includes(name));
  return pair(known, first[0] ?? numbers[0] ?? "", first[1] ?? numbers[1] ?? numbers[0] ?? "");
}

export function LayoutChoice({ layouts, known, layout }: { layouts: Layouts; known: Columns; layout: Layout }) {
  const [kind = "", ...parts] = layout.id.split(":");
  const numbers = known.columns.map((one, place) => ({ ...one, place })).filter((one) => one.kind === "number");
  const show = (id: string) => go({ values: { layout: id, at: "" } });
  const first = layouts.classes[0];
  const kinds = [...(layouts.cells.length ? ["all"] : []), ...(first ? layouts.kinds : []), ...(numbers.length ? ["pair"] : [])];
  const choose = (next: string) => {
    if (next === "all") show("all");
    else if (next === "pair") show(defaultPair(known));
    else show(`${next}:${layouts.kinds.includes(kind) ? parts[0] : first!.class_index}`);
  };
  return (
    <div class="choices">
      <label>
        Map
        <select value={kind} onChange={(event) => choose(event.currentTarget.value)}>
          {kinds.map((one) => (
            <option value={one}>{TITLES[one] ?? one}</option>
          ))}
        </select>
      </label>
      {layouts.kinds.includes(kind) && (
        <label>
          Class
          <select value={parts[0]} onChange={(event) => show(`${kind}:${event.currentTarget.value}`)}>
            {layouts.classes.map((one) => (
              <option value={String(one.class_index)}>{`${one.class} (${one.size})`}</option>
            ))}
          </select>
        </label>
      )}
      {kind === "pair" &&
        [0, 1].map((axis) => (
          <label>
            {axis ? "Upwards" : "To the right"}
            <select
              value={parts[axis]}
              onChange={(event) => {
                const next = [...parts];
                next[axis] = event.currentTarget.value;
                show(`pair:${next.join(":")}`);
              }}
            >
              {numbers.map((one) => (
                <option value={String(one.place)}>{one.name}</option>
              ))}
            </select>
          </label>
        ))}
    </div>
  );
}

/** How far the map is, while it is not there. */
export function LayoutState({ layout }: { layout: Layout }) {
  const { progress } = layout;
  if (layout.points) return null;
  if (layout.failure)
    return (
      <div class="line">
        <p class="failure">{layout.failure}</p>
        {progress?.state === "absent" && (
          <button type="button" onClick={layout.start}>
            try again
          </button>
        )}
      </div>
    );
  if (!progress || progress.state === "ready") return <p class="soft">Loading …</p>;
  if (progress.state === "working") {
    const left = progress.seconds_left;
    return (
      <div class="line" role="status">
        <progress value={progress.done} max={progress.total} aria-label="Computing this map" />
        <span class="soft small">{left == null ? "computing …" : `about ${Math.ceil(left)} s left`}</span>
        <button type="button" onClick={layout.stop}>
          stop
        </button>
      </div>
    );
  }
  return (
    <div class="line">
      <p class="soft">{progress.failure || "The run does not keep this map."}</p>
      <button type="button" onClick={layout.start}>
        compute this map
      </button>
    </div>
  );
}
