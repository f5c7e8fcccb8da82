// Beside the map: its groups in words and numbers, filters, and what people kept.

import { useEffect, useState } from "preact/hooks";
import { post, remove } from "./api";
import { css, fetchKept, type Column, type Filter, type Filters, type Group, type Kept, passes, rampColours, UNKNOWN } from "./mapdata";
import { go, readState, writeState } from "./state";

const AT_ONCE = 40; // groups in the table before the rest is asked for

/** Groups of the colour's column: how many, shown or not, and each can be selected.  It is the map's text alternative. */
export function Groups(props: {
  column: Column;
  groups: Group[];
  filter: Filter | undefined;
  ends: [number, number];
  dark: boolean;
  onFilter: (filter: Filter | undefined) => void;
  onSelect: (code: number) => void;
}) {
  const { column, groups, filter } = props;
  const [whole, setWhole] = useState(false);
  if (column.kind === "number") return <Range {...props} />;
  const toggle = (code: number) => {
    const now = new Set(filter && "codes" in filter ? filter.codes : []);
    const not = !filter || !("codes" in filter) || filter.not;
    if (now.has(code)) now.delete(code);
    else now.add(code);
    props.onFilter(now.size ? { codes: [...now].sort((a, b) => a - b), not } : undefined);
  };
  const shown = whole ? groups : groups.slice(0, AT_ONCE);
  return (
    <>
      <table class="groups">
        <caption class="hidden">Points by {column.name}</caption>
        <thead>
          <tr>
            <th scope="col">{column.name}</th>
            <th scope="col">shown</th>
            <th scope="col">selected</th>
          </tr>
        </thead>
        <tbody>
          {shown.map((one) => (
            <tr key={one.code} class={passes(filter, one.code) ? "" : "off"}>
              <th scope="row">
                <div>
                <label>
                  <input type="checkbox" checked={passes(filter, one.code)} onChange={() => toggle(one.code)} />
                  <span class="dot" style={{ background: css(one.colour) }} />
                  <span>
                    {one.name}
                    {one.coloured < one.shown && (
                      <span class="soft small" title="The others are members of several, and have the colour of another one">
                        {" "}
                        {one.coloured.toLocaleString("en")} coloured
                      </span>
                    )}
                  </span>
                </label>
                <button type="button" class="plain only" aria-label={`only ${one.name}`} onClick={() => props.onFilter({ codes: [one.code], not: false })}>
                  only
                </button>
                </div>
              </th>
              <td>{one.shown.toLocaleString("en")}</td>
              <td>
                <button type="button" class="plain" aria-label={`${one.chosen ? one.chosen.toLocaleString("en") : "select"}: select ${one.name}`} onClick={() => props.onSelect(one.code)}>
                  {one.chosen ? one.chosen.toLocaleString("en") : "select"}
                </button>
              </td>
            </tr>
          ))}
        </tbody>
      </table>
      {groups.length > shown.length && (
        <button type="button" class="plain" onClick={() => setWhole(true)}>
          {groups.length - shown.length} more
        </button>
      )}
      {shown.some((one) => one.coloured < one.shown) && (
        <p class="soft small">
          A sample of several has the colour of the first of them that is shown; it is counted, and selected, with each.
        </p>
      )}
      {filter && (
        <button type="button" class="plain" onClick={() => props.onFilter(undefined)}>
          show all
        </button>
      )}
    </>
  );
}

function Range(props: { column: Column; filter: Filter | undefined; ends: [number, number]; dark: boolean; onFilter: (f: Filter | undefined) => void }) {
  const filter = props.filter && "low" in props.filter ? props.filter : { low: -Infinity, high: Infinity };
  const stops = rampColours(props.dark, 9).map(css);
  const field = (end: "low" | "high", label: string) => (
    <label key={`${end} ${filter[end]}`}>
      {label}
      <input
        type="number"
        step="any"
        defaultValue={Number.isFinite(filter[end]) ? String(filter[end]) : ""}
        onChange={(event) => {
          const text = event.currentTarget.value;
          const next = { ...filter, [end]: text === "" ? (end === "low" ? -Infinity : Infinity) : Number(text) };
          props.onFilter(Number.isFinite(next.low) || Number.isFinite(next.high) ? next : undefined);
        }}
      />
    </label>
  );
  return (
    <div class="range">
      <div class="ramp" style={{ backgroundImage: `linear-gradient(90deg, ${stops.join()})` }} />
      <div class="line small soft">
        <span>{props.ends[0].toPrecision(3)}</span>
        <span>{props.column.name}</span>
        <span>{props.ends[1].toPrecision(3)}</span>
      </div>
      <div class="filters">
        {field("low", "from")}
        {field("high", "to")}
      </div>
    </div>
  );
}

/** Filters on columns other than that of the colour, each with a button that takes it away. */
export function Chips({ filters, columns, onRemove }: { filters: Filters; columns: Column[]; onRemove: (name: string) => void }) {
  if (!filters.size) return null;
  const tell = (name: string, filter: Filter): string => {
    if ("low" in filter) return `${name} ${Number.isFinite(filter.low) ? filter.low : "…"} to ${Number.isFinite(filter.high) ? filter.high : "…"}`;
    const values = columns.find((one) => one.name === name)?.values ?? [];
    const names = filter.codes.map((code) => (code === UNKNOWN ? "none" : (values[code] ?? "?")));
    return `${name}${filter.not ? " not" : ""}: ${names.length > 4 ? `${names.length} values` : names.join(", ")}`;
  };
  return (
    <div class="line chips" role="group" aria-label="Filters">
      {[...filters].map(([name, filter]) => (
        <button type="button" key={name} aria-label={`${tell(name, filter)} ×: remove this filter`} onClick={() => onRemove(name)}>
          {tell(name, filter)} ×
        </button>
      ))}
    </div>
  );
}

/** Views and selections that somebody gave a name. */
export function Saved({ run, chosen, onKeep }: { run: number; chosen: number; onKeep: (name: string) => Promise<void> }) {
  const [kept, setKept] = useState<Kept>({ views: [], selections: [] });
  const [name, setName] = useState("");
  const [told, setTold] = useState("");
  const read = () => fetchKept(run).then(setKept, (error: Error) => setTold(error.message));
  useEffect(() => void read(), [run]);
  const act = async (work: Promise<unknown>, text: string) => {
    try {
      await work;
      setTold(text);
      await read();
    } catch (error) {
      setTold((error as Error).message);
    }
  };
  const forget = (path: string) => remove(`runs/${run}/${path}`);
  const title = name.trim();
  return (
    <section class="saved" aria-label="Saved">
      <h3>Saved</h3>
      <form
        class="line"
        onSubmit={(event) => {
          event.preventDefault();
          if (title) void act(post(`runs/${run}/views`, { name: title, state: writeState(readState()) }), `view ${title} saved`);
        }}
      >
        <input aria-label="Name" placeholder="a name" maxLength={80} value={name} onInput={(event) => setName(event.currentTarget.value)} />
        <button type="submit" disabled={!title}>
          save view
        </button>
        <button type="button" disabled={!title || !chosen} onClick={() => void act(onKeep(title), `selection ${title} saved`)}>
          save selection
        </button>
      </form>
      <p class="soft small" role="status">
        {told}
      </p>
      <ul>
        {kept.views.map((one) => (
          <li>
            <a href={`#${one.state}`}>{one.name}</a>
            <span class="soft small">view</span>
            <Delete what={`view ${one.name}`} onClick={() => void act(forget(`views/${encodeURIComponent(one.name)}`), "deleted")} />
          </li>
        ))}
        {kept.selections.map((one) => (
          <li>
            <button type="button" class="plain" onClick={() => go({ values: { chosen: one.id, from: "" } })}>
              {one.name}
            </button>
            <span class="soft small">{one.size.toLocaleString("en")} selected</span>
            <Delete what={`selection ${one.name}`} onClick={() => void act(forget(`selections/${one.id}`), "deleted")} />
          </li>
        ))}
      </ul>
    </section>
  );
}

function Delete({ what, onClick }: { what: string; onClick: () => void }) {
  return (
    <button type="button" class="plain" aria-label={`delete ${what}`} onClick={onClick}>
      ×
    </button>
  );
}
