// Pictures of samples: as they are, their map, or the map laid over them.  One zoom for all that are shown.

import type { ComponentChildren } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { getPalettes, relevanceOf, sampleUrl, type Palettes, type Relevance } from "./api";

export type Mode = "input" | "overlay" | "relevance";

export interface Look {
  mode: Mode;
  palette: string;
  opacity: number; // of the map over the picture, 0..1
  same: boolean; // one scale for all, or each its own
}

export interface Zoom {
  factor: number;
  x: number; // the point that stays where it is, as shares of the picture
  y: number;
}

export const WHOLE: Zoom = { factor: 1, x: 0.5, y: 0.5 };

/** Greatest |score| of these maps. */
export function scaleOf(maps: (Relevance | undefined)[]): number {
  let most = 0;
  for (const map of maps) if (map) for (const value of map.values) most = Math.max(most, Math.abs(value));
  return most;
}

/** All maps of these samples, as they come in. */
export function useMaps(run: number, rows: (number | null)[], wanted: boolean): (Relevance | undefined)[] {
  const key = wanted ? `${run}:${rows.join()}` : "";
  const [found, setFound] = useState<{ key: string; maps: (Relevance | undefined)[] }>({ key: "", maps: [] });
  useEffect(() => {
    if (!wanted) return;
    let alive = true;
    const maps: (Relevance | undefined)[] = rows.map(() => undefined);
    rows.forEach((row, i) => {
      if (row === null) return;
      relevanceOf(run, row).then(
        (map) => {
          maps[i] = map;
          if (alive) setFound({ key, maps: [...maps] });
        },
        () => undefined,
      );
    });
    return () => {
      alive = false;
    };
  }, [key]);
  return found.key === key ? found.maps : rows.map(() => undefined);
}

let tables: Palettes | undefined;
export function usePalettes(): Palettes | undefined {
  const [known, setKnown] = useState(tables);
  useEffect(() => {
    getPalettes().then((found) => {
      tables = found;
      setKnown(found);
    });
  }, []);
  return known;
}

function paint(canvas: HTMLCanvasElement, map: Relevance, look: Look, scale: number, known: Palettes): void {
  const table = known.palettes[look.palette] ?? known.palettes["diverging"]!;
  const one = known.one_sided.includes(look.palette);
  const middle = (table.length - 1) / 2;
  canvas.width = map.width;
  canvas.height = map.height;
  const pen = canvas.getContext("2d")!;
  const image = pen.createImageData(map.width, map.height);
  map.values.forEach((value, i) => {
    const share = scale > 0 ? Math.max(-1, Math.min(1, value / scale)) : 0;
    const entry = Math.round(one ? Math.max(0, share) * (table.length - 1) : middle + share * middle);
    image.data.set(table[entry]!, 4 * i);
    const strength = Math.abs(one ? Math.max(0, share) : share);
    image.data[4 * i + 3] = look.mode === "overlay" ? Math.round(255 * look.opacity * strength ** 0.6) : 255;
  });
  pen.putImageData(image, 0, 0);
}

function MapCanvas({ map, look, scale }: { map: Relevance; look: Look; scale: number }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const known = usePalettes();
  useEffect(() => {
    if (canvas.current && known) paint(canvas.current, map, look, scale, known);
  }, [map, look.mode, look.palette, look.opacity, scale, known]);
  return <canvas ref={canvas} aria-hidden="true" />;
}

/** One sample.  `scale`: the |score| that gets the end colour. */
export function Picture(props: {
  run: number;
  row: number;
  look: Look;
  map?: Relevance | undefined;
  scale: number;
  zoom: Zoom;
  onZoom: (zoom: Zoom) => void;
  label: string;
  side?: number;
  src?: string; // another picture than the sample's, of the part that the model gets
  children?: ComponentChildren;
}) {
  const { run, row, look, map, scale, zoom } = props;
  const part = look.mode === "input" ? "whole" : "input";
  const shown = { transform: `scale(${zoom.factor})`, transformOrigin: `${100 * zoom.x}% ${100 * zoom.y}%` };
  const change = (event: WheelEvent | MouseEvent, factor: number) => {
    const frame = (event.currentTarget as HTMLElement).getBoundingClientRect();
    const point = { x: (event.clientX - frame.left) / frame.width, y: (event.clientY - frame.top) / frame.height };
    props.onZoom(factor <= 1 ? WHOLE : { factor, ...(zoom.factor > 1 ? { x: zoom.x, y: zoom.y } : point) });
  };
  return (
    <figure class="sample">
      <div
        class={`frame ${look.mode}`}
        onWheel={(event) => {
          if (!event.ctrlKey && !event.altKey) return; // the page scrolls
          event.preventDefault();
          change(event, Math.min(12, Math.max(1, zoom.factor * (event.deltaY < 0 ? 1.25 : 0.8))));
        }}
        onDblClick={(event) => change(event, zoom.factor > 1 ? 1 : 3)}
      >
        <div class="inside" style={shown}>
          {look.mode !== "relevance" && (
            <img src={props.src ?? sampleUrl(run, row, props.side ?? 224, part)} alt={props.label} loading="lazy" />
          )}
          {look.mode !== "input" && map && (
            <MapCanvas map={map} look={look} scale={look.same ? scale : scaleOf([map])} />
          )}
          {look.mode === "relevance" && <span class="hidden">{`relevance of ${props.label}`}</span>}
        </div>
      </div>
      {props.children}
    </figure>
  );
}
