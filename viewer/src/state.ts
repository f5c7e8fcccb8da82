// All that a link holds: what is shown stands in the address after "#", so that a page can be sent, kept and gone back to.

import { useEffect, useState } from "preact/hooks";

export interface State {
  run: number;
  view: string; // findings, map, try, compare
  finding: string;
  values: Record<string, string>; // all else, by name: filters, palette, layout, selection
}

const DEFAULT: State = { run: 0, view: "findings", finding: "", values: {} };
const listeners = new Set<() => void>();

export function readState(hash: string = location.hash): State {
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  const state: State = { ...DEFAULT, values: {} };
  for (const [name, value] of given) {
    if (name === "run") state.run = Math.max(0, Number.parseInt(value, 10) || 0);
    else if (name === "view") state.view = value;
    else if (name === "finding") state.finding = value;
    else state.values[name] = value;
  }
  return state;
}

export function writeState(state: State): string {
  const given = new URLSearchParams();
  if (state.run) given.set("run", String(state.run));
  if (state.view !== DEFAULT.view) given.set("view", state.view);
  if (state.finding) given.set("finding", state.finding);
  for (const name of Object.keys(state.values).sort()) if (state.values[name]) given.set(name, state.values[name]!);
  return given.toString();
}

/** Change what is shown; `values` are merged, an empty one is left out.  `replace`: no step for the back button. */
export function go(change: Partial<State>, replace = false): void {
  const now = readState();
  const next: State = { ...now, ...change, values: { ...now.values, ...change.values } };
  const address = `${location.pathname}${location.search}#${writeState(next)}`;
  if (replace) history.replaceState(null, "", address);
  else history.pushState(null, "", address);
  for (const listener of listeners) listener();
}

/** Whether a media query holds, and again whenever that changes. */
export function useMedia(text: string): boolean {
  const [holds, setHolds] = useState(matchMedia(text).matches);
  useEffect(() => {
    const query = matchMedia(text);
    const look = () => setHolds(query.matches);
    look();
    query.addEventListener("change", look);
    return () => query.removeEventListener("change", look);
  }, [text]);
  return holds;
}

export function useAddress(): State {
  const [state, set] = useState(readState());
  useEffect(() => {
    const look = () => set(readState());
    listeners.add(look);
    addEventListener("popstate", look);
    addEventListener("hashchange", look);
    return () => {
      listeners.delete(look);
      removeEventListener("popstate", look);
      removeEventListener("hashchange", look);
    };
  }, []);
  return state;
}
