// A picture on which a region is painted: with the pointer, or with arrow keys and space.

import { useEffect, useRef, useState } from "preact/hooks";
import { copyMask, polygon, rectangle, stroke, type Mask, type Point } from "./masks";

export type Tool = "brush" | "eraser" | "rectangle" | "polygon";
const TOOLS: Tool[] = ["brush", "eraser", "rectangle", "polygon"];
const NEAR = 9; // pixels of the screen from a polygon's first point at which it closes

export function Easel(props: {
  src: string;
  label: string;
  mask: Mask;
  onMask: (mask: Mask) => void;
  undo: (() => void) | undefined;
}) {
  const { mask } = props;
  const canvas = useRef<HTMLCanvasElement>(null);
  const [tool, setTool] = useState<Tool>("brush");
  const [size, setSize] = useState(Math.max(2, Math.round(Math.max(mask.height, mask.width) / 12)));
  const [cursor, setCursor] = useState<Point>();
  const [points, setPoints] = useState<Point[]>([]); // of a rectangle or a polygon that is not closed
  const draft = useRef<{ mask: Mask; at: Point } | undefined>(undefined);

  useEffect(() => draw(canvas.current!, draft.current?.mask ?? mask, tool, points, cursor, size));

  const place = (event: PointerEvent): Point => {
    const frame = canvas.current!.getBoundingClientRect();
    const share = (value: number) => Math.min(0.99999, Math.max(0, value));
    return [
      share((event.clientX - frame.left) / frame.width) * mask.width,
      share((event.clientY - frame.top) / frame.height) * mask.height,
    ];
  };
  const change = (how: (next: Mask) => void) => {
    const next = copyMask(mask);
    how(next);
    props.onMask(next);
  };
  const close = (corners: Point[]) => {
    setPoints([]);
    if (tool === "rectangle" && corners.length === 2) change((next) => rectangle(next, corners[0]!, corners[1]!));
    if (tool === "polygon" && corners.length > 2) change((next) => polygon(next, corners));
  };
  const down = (event: PointerEvent) => {
    if (event.button !== 0) return;
    const at = place(event);
    if (tool === "polygon") {
      const first = points[0];
      const pixel = canvas.current!.getBoundingClientRect().width / mask.width;
      if (first && points.length > 2 && Math.hypot(at[0] - first[0], at[1] - first[1]) * pixel < NEAR) close(points);
      else setPoints([...points, at]);
      return;
    }
    canvas.current!.setPointerCapture(event.pointerId);
    if (tool === "rectangle") setPoints([at]);
    else {
      draft.current = { mask: copyMask(mask), at };
      stroke(draft.current.mask, at, at, size, tool === "brush" ? 1 : 0);
    }
    setCursor(at);
  };
  const move = (event: PointerEvent) => {
    const at = place(event);
    if (draft.current) {
      stroke(draft.current.mask, draft.current.at, at, size, tool === "brush" ? 1 : 0);
      draft.current.at = at;
    }
    setCursor(at);
  };
  const up = (event: PointerEvent) => {
    if (draft.current) {
      const done = draft.current.mask;
      draft.current = undefined;
      props.onMask(done);
    } else if (tool === "rectangle" && points.length) close([points[0]!, place(event)]);
  };
  const press = (event: KeyboardEvent) => {
    const steps: Record<string, Point> = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const by = steps[event.key];
    const [x, y] = cursor ?? [Math.floor(mask.width / 2) + 0.5, Math.floor(mask.height / 2) + 0.5];
    if (by) {
      const far = event.shiftKey ? 5 : 1;
      const inside = (value: number, end: number) => Math.min(end - 0.5, Math.max(0.5, value));
      setCursor([inside(x + far * by[0], mask.width), inside(y + far * by[1], mask.height)]);
    } else if (event.key === " " || event.key === "Enter") {
      if (tool === "brush" || tool === "eraser")
        change((next) => stroke(next, [x, y], [x, y], size, tool === "brush" ? 1 : 0));
      else if (tool === "rectangle" && points.length) close([points[0]!, [x, y]]);
      else if (tool === "polygon" && event.key === "Enter" && points.length > 2) close(points);
      else setPoints([...points, [x, y]]);
      setCursor([x, y]);
    } else if (event.key === "Escape" && points.length) setPoints([]);
    else if (event.key === "z" && props.undo) props.undo();
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  const told = cursor ? `column ${Math.floor(cursor[0])}, row ${Math.floor(cursor[1])}` : "";
  return (
    <div class="easel">
      <div class="line" role="group" aria-label="Tools">
        {TOOLS.map((one) => (
          <button
            type="button"
            aria-pressed={tool === one}
            onClick={() => {
              setTool(one);
              setPoints([]);
            }}
          >
            {one}
          </button>
        ))}
        <label class="soft small line">
          size
          <input
            type="range"
            min="1"
            max={Math.ceil(Math.max(mask.height, mask.width) / 3)}
            value={size}
            aria-valuetext={`${size} pixels of the model's input`}
            onInput={(event) => setSize(Number(event.currentTarget.value))}
          />
          {size} px
        </label>
      </div>
      <div class="board" style={{ aspectRatio: `${mask.width} / ${mask.height}` }}>
        <img src={props.src} alt={props.label} draggable={false} />
        <canvas
          ref={canvas}
          width={mask.width}
          height={mask.height}
          tabIndex={0}
          role="application"
          aria-label="Region. Arrow keys move the brush (five pixels with Shift), space paints; z takes back"
          onPointerDown={down}
          onPointerMove={move}
          onPointerUp={up}
          onPointerLeave={() => !draft.current && document.activeElement !== canvas.current && setCursor(undefined)}
          onKeyDown={press}
        />
      </div>
      <p class="soft small">
        {tool === "polygon"
          ? "Click the corners; the first one again, or Enter, closes it."
          : tool === "rectangle"
            ? "Drag from corner to corner."
            : "Drag to paint."}{" "}
        By keyboard: arrows move, Shift five pixels at once, space paints.
      </p>
      <span class="hidden" role="status">
        {told}
      </span>
    </div>
  );
}

function draw(canvas: HTMLCanvasElement, mask: Mask, tool: Tool, points: Point[], cursor: Point | undefined, size: number): void {
  const pen = canvas.getContext("2d")!;
  const shown = copyMask(mask);
  if (tool === "rectangle" && points.length && cursor) rectangle(shown, points[0]!, cursor);
  if (tool === "polygon" && points.length) {
    const corners = cursor ? [...points, cursor] : points;
    if (corners.length > 2) polygon(shown, corners);
    corners.forEach((one, i) => i && stroke(shown, corners[i - 1]!, one, 1, 1));
    stroke(shown, corners[0]!, corners[0]!, 2, 1);
  }
  const image = pen.createImageData(mask.width, mask.height);
  shown.on.forEach((one, i) => one && image.data.set([255, 0, 170, 120], 4 * i));
  pen.putImageData(image, 0, 0);
  if (!cursor) return;
  pen.lineWidth = Math.max(0.5, mask.width / 300);
  pen.strokeStyle = "#fff";
  pen.beginPath();
  pen.arc(cursor[0], cursor[1], tool === "brush" || tool === "eraser" ? Math.max(0.75, size / 2) : 0.7, 0, 2 * Math.PI);
  pen.stroke();
}
