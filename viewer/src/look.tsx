// How pictures are looked at: read from the address, and chosen by the same controls wherever there are pictures.

import { usePalettes, type Look, type Mode } from "./pictures";
import { go, type State } from "./state";

const MODES: Mode[] = ["input", "overlay", "relevance"];

/** The look that the address asks for; `usual` where it asks for none. */
export function readLook(state: State, usual: Mode): Look {
  const { look = usual, palette = "diverging", opacity = "90", scale = "same" } = state.values;
  return {
    mode: (MODES.includes(look as Mode) ? look : usual) as Mode,
    palette,
    opacity: Math.min(1, Math.max(0, Number(opacity) / 100)),
    same: scale !== "own",
  };
}

/** Picture, overlay or map; `only`: the one that there is. */
export function ModeButtons({ mode, only }: { mode: Mode; only?: Mode | undefined }) {
  return (
    <div class="line" role="group" aria-label="What is shown">
      {MODES.map((one) => (
        <button
          type="button"
          aria-pressed={mode === one}
          disabled={only !== undefined && only !== one}
          onClick={() => go({ values: { look: one } }, true)}
        >
          {one}
        </button>
      ))}
    </div>
  );
}

export function PaletteChoice({ palette }: { palette: string }) {
  const known = usePalettes();
  return (
    <label class="small soft">
      Palette{" "}
      <select value={palette} onChange={(event) => go({ values: { palette: event.currentTarget.value } }, true)}>
        {Object.keys(known?.palettes ?? { diverging: 0 }).map((name) => (
          <option value={name}>{name}</option>
        ))}
      </select>
    </label>
  );
}

/** Some of many, by pages; the page stands in the address under `name`. */
export function Pager(props: { name: string; page: number; each: number; count: number; of?: boolean }) {
  const { page, each, count } = props;
  if (count <= each) return null;
  const first = page * each;
  const show = (next: number) => go({ values: { [props.name]: String(next) } }, true);
  return (
    <div class="line">
      <button type="button" disabled={page === 0} onClick={() => show(page - 1)}>
        previous
      </button>
      <span class="soft small">
        {first + 1} to {Math.min(first + each, count)}
        {props.of && ` of ${count}`}
      </span>
      <button type="button" disabled={first + each >= count} onClick={() => show(page + 1)}>
        next
      </button>
    </div>
  );
}
