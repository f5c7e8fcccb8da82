// The canvas of the map: moving about, drawing a box or a lasso, and what lies under the pointer.

import { useEffect, useRef, useState } from "preact/hooks";
import { Scatter, type Camera } from "./scatter";

export type Tool = "move" | "box" | "lasso";
export type How = "new" | "add" | "subtract";
export type Outline = { polygon: number[] } | { box: number[] };

const REACH = 14; // pixels round the pointer in which a point is found
const DWELL = 125; // milliseconds before a card is shown
const MOST_CORNERS = 2000;

interface Under {
  row: number;
  x: number;
  y: number;
}

export function Surface(props: {
  scatter: { current: Scatter | null };
  tool: Tool;
  how: How;
  label: string;
  cells: { class: string; x: number; y: number }[];
  marked: [number, number] | undefined; // a point that is pointed to from elsewhere
  onReady: () => void;
  onCamera: (camera: Camera) => void;
  onOutline: (outline: Outline, how: How) => void;
  note: preact.ComponentChildren; // over the middle, while there are no points
  card: (row: number) => preact.ComponentChildren;
}) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const pointers = useRef(new Map<number, [number, number]>());
  const [path, setPath] = useState<[number, number][]>([]);
  const drawing = useRef<{ path: [number, number][]; how: How } | null>(null);
  const [under, setUnder] = useState<Under>();
  const [, setDrawn] = useState(0);
  const dwell = useRef(0);
  const latest = useRef(props);
  latest.current = props;

  useEffect(() => {
    const scatter = new Scatter(canvas.current!);
    props.scatter.current = scatter;
    let frame = 0;
    scatter.drawn = () => {
      canvas.current!.dataset["drawn"] = String(++frame);
      setDrawn(frame); // names of cells and marks move with the points
    };
    const watch = new ResizeObserver(() => scatter.redraw());
    watch.observe(canvas.current!);
    const turn = (event: WheelEvent) => {
      event.preventDefault(); // not passive, so not among Preact's handlers
      const steps = event.deltaMode === 1 ? 16 * event.deltaY : event.deltaY;
      zoom(Math.exp(Math.max(-200, Math.min(200, steps)) * 0.002), ...place(event));
    };
    canvas.current!.addEventListener("wheel", turn, { passive: false });
    props.onReady();
    return () => {
      watch.disconnect();
      clearTimeout(dwell.current);
      scatter.end();
      props.scatter.current = null;
    };
  }, []);

  const place = (event: { clientX: number; clientY: number }): [number, number] => {
    const frame = canvas.current!.getBoundingClientRect();
    return [event.clientX - frame.left, event.clientY - frame.top];
  };
  const look = (camera: Camera) => {
    const scatter = props.scatter.current;
    if (!scatter || !(camera.height > 0) || !Number.isFinite(camera.height)) return;
    scatter.camera = camera;
    setUnder(undefined);
    scatter.redraw();
    latest.current.onCamera(camera);
  };
  const zoom = (factor: number, x: number, y: number) => {
    const scatter = latest.current.scatter.current!;
    const [px, py] = scatter.fromScreen(x, y);
    const now = scatter.camera;
    look({ x: px + (now.x - px) * factor, y: py + (now.y - py) * factor, height: now.height * factor });
  };
  const move = (x: number, y: number) => {
    const scatter = props.scatter.current!;
    const { camera, pixels } = scatter;
    look({ ...camera, x: camera.x - x / pixels, y: camera.y + y / pixels });
  };
  const point = (event: PointerEvent) => {
    clearTimeout(dwell.current);
    const [x, y] = place(event);
    const found = props.scatter.current?.nearest(x, y, REACH);
    if (!found) {
      setUnder(undefined);
      return;
    }
    if (found.row === under?.row) return;
    dwell.current = window.setTimeout(() => setUnder({ row: found.row, x: found.at[0], y: found.at[1] }), DWELL);
  };

  const down = (event: PointerEvent) => {
    canvas.current!.setPointerCapture(event.pointerId);
    pointers.current.set(event.pointerId, place(event));
    clearTimeout(dwell.current);
    setUnder(undefined);
    if (pointers.current.size > 1 || props.tool === "move" || event.button !== 0) {
      drawing.current = null; // a second finger pinches
      setPath([]);
      return;
    }
    const how: How = event.shiftKey ? "add" : event.altKey ? "subtract" : props.how;
    drawing.current = { path: [place(event)], how };
  };
  const drag = (event: PointerEvent) => {
    const before = pointers.current.get(event.pointerId);
    if (!before) {
      if (event.pointerType !== "touch") point(event);
      return;
    }
    const now = place(event);
    const other = [...pointers.current].find(([id]) => id !== event.pointerId)?.[1];
    pointers.current.set(event.pointerId, now);
    if (other) {
      const far = (from: [number, number]) => Math.hypot(from[0] - other[0], from[1] - other[1]) || 1;
      zoom(far(before) / far(now), ...other);
    } else if (!drawing.current) move(now[0] - before[0], now[1] - before[1]);
    else if (props.tool === "box") {
      drawing.current.path = [drawing.current.path[0]!, now];
      setPath(drawing.current.path);
    } else {
      const line = drawing.current.path;
      const last = line.at(-1)!;
      if (Math.hypot(now[0] - last[0], now[1] - last[1]) < 2.5) return;
      line.push(now);
      if (line.length > MOST_CORNERS) drawing.current.path = line.filter((_, i) => i % 2 === 0);
      setPath([...drawing.current.path]);
    }
  };
  const up = (event: PointerEvent) => {
    pointers.current.delete(event.pointerId);
    const drawn = drawing.current;
    drawing.current = null;
    setPath([]);
    if (!drawn || event.type === "pointercancel") return;
    const scatter = props.scatter.current!;
    if (drawn.path.length < (props.tool === "box" ? 2 : 3)) return;
    const corners = drawn.path.flatMap(([x, y]) => scatter.fromScreen(x, y));
    props.onOutline(props.tool === "box" ? { box: corners } : { polygon: corners }, drawn.how);
  };
  const press = (event: KeyboardEvent) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { clientWidth: wide, clientHeight: high } = canvas.current!;
    const moves: Record<string, [number, number]> = {
      ArrowLeft: [wide / 8, 0],
      ArrowRight: [-wide / 8, 0],
      ArrowUp: [0, high / 8],
      ArrowDown: [0, -high / 8],
    };
    const by = moves[event.key];
    if (by) move(...by);
    else if (event.key === "+" || event.key === "=") zoom(0.8, wide / 2, high / 2);
    else if (event.key === "-") zoom(1.25, wide / 2, high / 2);
    else if (event.key === "0") look(props.scatter.current!.whole());
    else if (event.key === "Escape" && drawing.current) {
      drawing.current = null;
      setPath([]);
      event.stopPropagation();
    } else return;
    event.preventDefault();
  };

  const scatter = props.scatter.current;
  const [box, lasso] = [props.tool === "box", path.map((corner) => corner.join()).join(" ")];
  const ring = scatter && (under ? [under.x, under.y] : props.marked);
  const at = ring && scatter.toScreen(ring[0]!, ring[1]!);
  return (
    <div class={`surface ${props.tool}`}>
      <canvas
        ref={canvas}
        tabIndex={0}
        role="application"
        aria-label={`${props.label}. Arrow keys move, plus and minus zoom, 0 shows all. The table of groups says the same in words.`}
        onPointerDown={down}
        onPointerMove={drag}
        onPointerUp={up}
        onPointerCancel={up}
        onPointerLeave={() => {
          clearTimeout(dwell.current);
          setUnder(undefined);
        }}
        onKeyDown={press}
      />
      <svg class="above" aria-hidden="true">
        {scatter &&
          props.cells.map((cell) => {
            const [x, y] = scatter.toScreen(cell.x, cell.y);
            const side = scatter.pixels;
            if (side < 34 || x > scatter.canvas.clientWidth || y > scatter.canvas.clientHeight || x + side < 0 || y + side < 0)
              return null;
            return (
              <>
                <rect class="cell" x={x} y={y} width={side} height={side} />
                <text x={x + 4} y={y + 13}>
                  {cell.class.slice(0, Math.floor(side / 8))}
                </text>
              </>
            );
          })}
        {path.length > 1 && box && (
          <rect
            class="drawn"
            x={Math.min(path[0]![0], path[1]![0])}
            y={Math.min(path[0]![1], path[1]![1])}
            width={Math.abs(path[0]![0] - path[1]![0])}
            height={Math.abs(path[0]![1] - path[1]![1])}
          />
        )}
        {path.length > 1 && !box && <polygon class="drawn" points={lasso} />}
        {at && <circle class="ring" cx={at[0]} cy={at[1]} r={8} />}
      </svg>
      {props.note && <div class="note">{props.note}</div>}
      {scatter && !scatter.usable && (
        <p class="failure">This browser has no WebGL2, so no points are drawn; the table of groups can be used.</p>
      )}
      {under && at && scatter && (
        <div
          class="card"
          style={{
            left: `${Math.min(at[0]! + 14, Math.max(0, scatter.canvas.clientWidth - 250))}px`,
            top: `${Math.max(4, Math.min(at[1]! + 14, scatter.canvas.clientHeight - 130))}px`,
          }}
        >
          {props.card(under.row)}
        </div>
      )}
    </div>
  );
}
