// The map of samples: points by colour, filters, lasso and box; what is selected becomes a gallery or a file.

import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { get, sampleUrl, type Overview } from "./api";
import { Gallery, tell } from "./gallery";
import { LayoutChoice, LayoutState, useLayout } from "./layouts";
import {
  colourBy, countGroups, fetchColumn, fetchFacts, fetchMembers, fetchSelection, firstPassing, flag, greyColour, keepSelection,
  readFilters, selectWithin, UNKNOWN, writeFilters, type Column, type Columns, type Facts, type Filter, type Layouts, type Members,
  type Values,
} from "./mapdata";
import { Chips, Groups, Saved } from "./mapside";
import { GREY, type Camera, type Scatter } from "./scatter";
import { go, useMedia, type State } from "./state";
import { Surface, type How, type Outline, type Tool } from "./surface";

const TOOLS: [Tool, string][] = [["move", "v"], ["box", "b"], ["lasso", "l"]];
const HOWS: [How, string][] = [["new", ""], ["add", "Shift"], ["subtract", "Alt"]];
const NO_ROWS = new Uint32Array(0);
const NO_POINTS = new Float32Array(0);

export function MapView({ run, overview, state }: { run: number; overview: Overview; state: State }) {
  const [columns, setColumns] = useState<Columns>();
  const [layouts, setLayouts] = useState<Layouts>();
  const [failure, setFailure] = useState("");
  useEffect(() => {
    get<Columns>(`runs/${run}/columns`).then(setColumns, (error: Error) => setFailure(error.message));
    get<Layouts>(`runs/${run}/layouts`).then(setLayouts, (error: Error) => setFailure(error.message));
  }, [run]);
  if (failure) return <p class="failure">{failure}</p>;
  if (!columns || !layouts) return <p class="waiting">Loading …</p>;
  return <MapPage run={run} overview={overview} state={state} known={columns} layouts={layouts} />;
}

interface Loaded {
  values: Values;
  members: Members | undefined;
}

/** Values of some columns, as they come in. */
function useValues(run: number, known: Columns, names: string[]): Map<string, Loaded> {
  const [found, setFound] = useState(new Map<string, Loaded>());
  const key = names.join("\n");
  useEffect(() => {
    let alive = true;
    for (const column of known.columns)
      if (names.includes(column.name) && column.kind !== "text")
        Promise.all([fetchColumn(run, known.version, column), column.several ? fetchMembers(run, known.version, column) : undefined]).then(
          ([values, members]) =>
            alive && setFound((old) => new Map([...old].filter(([name]) => names.includes(name))).set(column.name, { values, members })),
          () => undefined,
        );
    return () => {
      alive = false;
    };
  }, [run, known.version, key]);
  return found;
}

/** The selection, as the address names it and as it is being made. */
function useSelection(run: number, samples: number, chosen: string) {
  const [selection, setSelection] = useState<{ mask: Uint8Array | undefined; rows: Uint32Array; id: string }>({ mask: undefined, rows: NO_ROWS, id: "" });
  const [told, setTold] = useState("");
  const count = useRef(0);
  const hold = (mask: Uint8Array | undefined, id: string) => {
    const rows = new Uint32Array(mask?.reduce((sum, one) => sum + one, 0) ?? 0);
    let found = 0;
    if (mask) for (let row = 0; row < mask.length; row++) if (mask[row]) rows[found++] = row;
    setSelection(rows.length ? { mask, rows, id } : { mask: undefined, rows: NO_ROWS, id: "" });
    return rows.length;
  };
  useEffect(() => {
    if (chosen === selection.id) return;
    const number = ++count.current;
    if (!chosen) {
      hold(undefined, "");
      return;
    }
    fetchSelection(run, chosen, samples).then(
      (mask) => number === count.current && hold(mask, chosen),
      (error: Error) => setTold(error.message),
    );
  }, [run, chosen]);
  const change = async (mask: Uint8Array | undefined, name = "") => {
    const number = ++count.current;
    setTold("");
    if (!hold(mask, "")) {
      go({ values: { chosen: "", from: "" } }, true);
      return;
    }
    try {
      const id = await keepSelection(run, mask!, name);
      if (number !== count.current) return; // there is a later one
      setSelection((now) => ({ ...now, id }));
      go({ values: { chosen: id, ...(name ? {} : { from: "" }) } }, true);
    } catch (error) {
      setTold(`The selection is not kept: ${(error as Error).message}`);
    }
  };
  return { ...selection, told, change };
}

function MapPage({ run, overview, state, known, layouts }: { run: number; overview: Overview; state: State; known: Columns; layouts: Layouts }) {
  const scatter = useRef<Scatter | null>(null);
  const [ready, setReady] = useState(false);
  const [told, setTold] = useState("");
  const [tool, setTool] = useState<Tool>("lasso");
  const [how, setHow] = useState<How>("new");
  const [marked, setMarked] = useState<number>();
  const dark = useMedia("(prefers-color-scheme: dark)");
  const { values } = state;
  const drawable = known.columns.filter((one) => one.kind !== "text");
  const preferred = ["finding", "prediction", "label"].find((name) => drawable.some((one) => one.name === name && one.values.length > 1));
  const column: Column = drawable.find((one) => one.name === (values["colour"] || preferred)) ?? drawable[0]!;
  const only = values["only"] ?? "";
  const filters = useMemo(() => readFilters(only), [only]);
  const loaded = useValues(run, known, [column.name, ...filters.keys()]);
  const layout = useLayout(run, known, layouts, values["layout"] ?? "");
  const selection = useSelection(run, known.samples, values["chosen"] ?? "");
  const rows = useMemo(() => {
    if (!ready || !scatter.current) return NO_ROWS;
    scatter.current.setPoints(layout.points ?? NO_POINTS);
    return scatter.current.rows;
  }, [ready, layout.points]);

  // What is seen follows from the address: the camera, too, unless it was moved here.  Set together with the page's
  // words: who reads that the samples are shown may select what is in view at once.
  const moved = useRef("");
  const asked = useRef(false); // to select what is in view, before there was anything
  const at = values["at"] ?? "";
  useLayoutEffect(() => {
    if (!rows.length || (at && at === moved.current)) return;
    const [x, y, height] = at.split("_").map(Number);
    const given = at && [x, y, height].every(Number.isFinite) && height! > 0;
    scatter.current!.camera = given ? { x: x!, y: y!, height: height! } : scatter.current!.whole();
    scatter.current!.redraw();
    if (asked.current) selectView();
  }, [rows, at]);
  const waiting = useRef(0);
  const onCamera = (camera: Camera) => {
    clearTimeout(waiting.current);
    waiting.current = window.setTimeout(() => {
      moved.current = [camera.x, camera.y, camera.height].map((one) => Number(one.toPrecision(5))).join("_");
      go({ values: { at: moved.current } }, true);
    }, 300);
  };
  useEffect(() => () => clearTimeout(waiting.current), []);

  const { values: first, members } = loaded.get(column.name) ?? {};
  const filtered = filters.get(column.name);
  const own = useMemo(() => (first && members ? firstPassing(first as Uint32Array, members, filtered) : first), [first, members, filtered]);
  const colouring = useMemo(() => (own ? colourBy(column, own, rows, dark) : undefined), [own, column.name, rows, dark]);
  useEffect(() => {
    if (!colouring || !scatter.current) return;
    scatter.current.setPalette(colouring.palette, greyColour());
    scatter.current.setCodes(colouring.codes);
  }, [colouring]);
  const flags = useMemo(() => {
    const there = [...filters].filter(([name]) => loaded.has(name)).map(([name, filter]) => {
      const there = loaded.get(name)!;
      return [filter, there.values, there.members] as [Filter, Values, Members | undefined];
    });
    return flag(known.samples, there, selection.mask);
  }, [filters, loaded, selection.mask]);
  useEffect(() => scatter.current?.setFlags(flags), [flags, rows]);
  const groups = useMemo(() => (own && colouring ? countGroups(column, own, rows, flags, colouring, members) : []), [own, members, colouring, flags, rows]);
  const shown = useMemo(() => rows.reduce((sum, row) => sum + (flags[row]! & GREY ? 0 : 1), 0), [rows, flags]);

  const combine = (found: Uint32Array | number[], by: How) => {
    const mask = by === "new" || !selection.mask ? new Uint8Array(known.samples) : selection.mask.slice();
    for (const row of found) if (!(flags[row]! & GREY)) mask[row] = by === "subtract" ? 0 : 1;
    if (by === "subtract" && !selection.mask) return;
    void selection.change(mask);
  };
  const onOutline = async (outline: Outline, by: How) => {
    try {
      combine(await selectWithin(run, layout.id, outline), by);
      setTold("");
    } catch (error) {
      setTold((error as Error).message);
    }
  };
  const selectView = () => {
    asked.current = !rows.length;
    if (asked.current) return;
    const { canvas } = scatter.current!;
    const ends = [scatter.current!.fromScreen(0, 0), scatter.current!.fromScreen(canvas.clientWidth, canvas.clientHeight)];
    void onOutline({ box: ends.flat() }, how);
  };
  const selectGroup = (code: number) => {
    const all = members?.[code] && new Set(members[code]);
    combine(Array.from(rows.filter((row) => (all ? all.has(row) : first![row] === code))), how);
  };
  const filter = (name: string, what: Filter | undefined) => {
    const next = new Map(filters);
    if (what) next.set(name, what);
    else next.delete(name);
    go({ values: { only: writeFilters(next) } }, true);
  };
  const fit = () => {
    moved.current = "";
    go({ values: { at: "" } }, true);
    scatter.current!.camera = scatter.current!.whole();
    scatter.current!.redraw();
  };
  useLayoutEffect(() => {
    const press = (event: KeyboardEvent) => {
      if ((event.target as HTMLElement).closest("input:not([type=checkbox]), textarea, select, dialog")) return;
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const chosen = TOOLS.find(([, key]) => key === event.key);
      if (chosen) setTool(chosen[0]);
      else if (event.key === "a") selectView();
      else if (event.key === "Escape") void selection.change(undefined);
      else return;
      event.preventDefault();
    };
    addEventListener("keydown", press);
    return () => removeEventListener("keydown", press);
  });
  const place = marked === undefined || !layout.points ? undefined : layout.points.subarray(2 * marked, 2 * marked + 2);
  return (
    <div class="map">
      <section class="side" aria-label="What is drawn">
        <LayoutChoice layouts={layouts} known={known} layout={layout} />
        <label>
          Colour
          <select value={column.name} onChange={(event) => go({ values: { colour: event.currentTarget.value } }, true)}>
            {drawable.map((one) => (
              <option value={one.name}>{one.name}</option>
            ))}
          </select>
        </label>
        <Chips filters={filters} columns={known.columns} onRemove={(name) => filter(name, undefined)} />
        <Groups
          column={column}
          groups={groups}
          filter={filters.get(column.name)}
          ends={colouring ? [colouring.low, colouring.high] : [0, 1]}
          dark={dark}
          onFilter={(what) => filter(column.name, what)}
          onSelect={selectGroup}
        />
        <Saved run={run} chosen={selection.rows.length} onKeep={(name) => selection.change(selection.mask, name)} />
      </section>
      <main class="plot" aria-label="Map of samples">
        <h1 class="hidden">Map of samples</h1>
        <div class="line bar">
          <span class="line" role="group" aria-label="Tool">
            {TOOLS.map(([name, key]) => (
              <button type="button" aria-pressed={tool === name} onClick={() => setTool(name)}>
                {name} <kbd>{key}</kbd>
              </button>
            ))}
          </span>
          <span class="line" role="group" aria-label="What a selection does with the one before">
            {HOWS.map(([name, key]) => (
              <button type="button" aria-pressed={how === name} onClick={() => setHow(name)}>
                {name} {key && <kbd>{key}</kbd>}
              </button>
            ))}
          </span>
          <button type="button" onClick={selectView}>
            select what is in view <kbd>a</kbd>
          </button>
          <button type="button" onClick={fit}>
            show all <kbd>0</kbd>
          </button>
        </div>
        <Surface
          note={layout.points ? undefined : <LayoutState layout={layout} />}
          scatter={scatter}
          tool={tool}
          how={how}
          label={`Map of ${rows.length} of ${overview.samples} samples, coloured by ${column.name}`}
          cells={layout.id === "all" ? layouts.cells : []}
          marked={place && place[0] === place[0] ? [place[0]!, place[1]!] : undefined}
          onReady={() => setReady(true)}
          onCamera={onCamera}
          onOutline={(outline, by) => void onOutline(outline, by)}
          card={(row) => <Card key={row} run={run} row={row} column={column} values={own} />}
        />
        <p class="soft small" role="status">
          {layout.points && `${shown.toLocaleString("en")} of ${overview.samples.toLocaleString("en")} samples shown`}
          {rows.length > shown && `, ${(rows.length - shown).toLocaleString("en")} filtered out (grey)`}
          {overview.samples > rows.length && layout.points && `, ${(overview.samples - rows.length).toLocaleString("en")} not on this map`}
          {selection.rows.length > 0 && `, ${selection.rows.length.toLocaleString("en")} selected`}
          {[told, selection.told].filter(Boolean).map((text) => ` · ${text}`)}
        </p>
      </main>
      {selection.rows.length > 0 && (
        <Gallery run={run} rows={selection.rows} id={selection.id} state={state} onMark={setMarked} onClear={() => void selection.change(undefined)} />
      )}
    </div>
  );
}

/** What lies under the pointer. */
function Card({ run, row, column, values }: { run: number; row: number; column: Column; values: Values | undefined }) {
  const [facts, setFacts] = useState<Facts>();
  useEffect(() => {
    fetchFacts(run, [row]).then(([one]) => setFacts(one), () => undefined);
  }, [run, row]);
  const value = values?.[row];
  const several = column.several && facts ? facts.findings.join(", ") : "";
  const said = several || value === undefined ? several : column.kind === "number" ? value.toPrecision(4) : value === UNKNOWN ? "none" : column.values[value];
  return (
    <>
      <img src={sampleUrl(run, row, 96)} alt="" />
      <span>
        <b>{facts?.id ?? `sample ${row}`}</b>
        {facts && <span>{tell(facts)}</span>}
        <span class="soft">
          {column.name}: {said}
        </span>
      </span>
    </>
  );
}
