// Regions of a picture: a mask of the model's input, one byte a pixel, and the tools that change it.

export interface Mask {
  height: number;
  width: number;
  on: Uint8Array; // row by row, 0 or 1
}

export type Point = [x: number, y: number]; // in pixels of the mask; (0.5, 0.5) is the middle of the first

export function emptyMask(height: number, width: number): Mask {
  return { height, width, on: new Uint8Array(height * width) };
}

export function copyMask(mask: Mask): Mask {
  return { ...mask, on: mask.on.slice() };
}

export function countOn(mask: Mask): number {
  let count = 0;
  for (const one of mask.on) count += one;
  return count;
}

/** Lengths of runs, outside and inside by turns, outside first. */
export function toRuns(mask: Mask): number[] {
  const runs: number[] = [];
  let now = 0;
  let length = 0;
  for (const one of mask.on) {
    if (one !== now) {
      runs.push(length);
      now = one;
      length = 0;
    }
    length++;
  }
  runs.push(length);
  return runs;
}

function set(mask: Mask, inside: (x: number, y: number) => boolean, value: number, box: [number, number, number, number]): void {
  const [left, top, right, bottom] = box;
  for (let y = Math.max(0, Math.floor(top)); y < Math.min(mask.height, Math.ceil(bottom)); y++)
    for (let x = Math.max(0, Math.floor(left)); x < Math.min(mask.width, Math.ceil(right)); x++)
      if (inside(x + 0.5, y + 0.5)) mask.on[y * mask.width + x] = value;
}

/** A stroke of a round brush of this diameter. */
export function stroke(mask: Mask, from: Point, to: Point, size: number, value: number): void {
  const radius = Math.max(0.75, size / 2);
  const [dx, dy] = [to[0] - from[0], to[1] - from[1]];
  const length = dx * dx + dy * dy;
  const inside = (x: number, y: number) => {
    const along = length ? Math.max(0, Math.min(1, ((x - from[0]) * dx + (y - from[1]) * dy) / length)) : 0;
    return Math.hypot(x - from[0] - along * dx, y - from[1] - along * dy) <= radius;
  };
  const [left, right] = [Math.min(from[0], to[0]) - radius, Math.max(from[0], to[0]) + radius];
  const [top, bottom] = [Math.min(from[1], to[1]) - radius, Math.max(from[1], to[1]) + radius];
  set(mask, inside, value, [left, top, right, bottom]);
}

/** All pixels that two opposite corners span, those of the corners too. */
export function rectangle(mask: Mask, a: Point, b: Point): void {
  const box: [number, number, number, number] = [
    Math.floor(Math.min(a[0], b[0])),
    Math.floor(Math.min(a[1], b[1])),
    Math.floor(Math.max(a[0], b[0])) + 1,
    Math.floor(Math.max(a[1], b[1])) + 1,
  ];
  set(mask, () => true, 1, box);
}

/** Pixels whose middle is inside, by the even-odd rule. */
export function polygon(mask: Mask, points: Point[]): void {
  const inside = (x: number, y: number) => {
    let odd = false;
    points.forEach(([ax, ay], i) => {
      const [bx, by] = points[(i + 1) % points.length]!;
      if (ay > y !== by > y && x < ax + ((y - ay) / (by - ay)) * (bx - ax)) odd = !odd;
    });
    return odd;
  };
  set(mask, inside, 1, [0, 0, mask.width, mask.height]);
}

/** The share of a map (of any size, over the same picture) with the greatest positive values. */
export function strongest(mask: Mask, map: { height: number; width: number; values: Float32Array }, share: number): void {
  const values = new Float32Array(mask.on.length);
  for (let y = 0; y < mask.height; y++)
    for (let x = 0; x < mask.width; x++) {
      const row = Math.floor(((y + 0.5) * map.height) / mask.height);
      const column = Math.floor(((x + 0.5) * map.width) / mask.width);
      values[y * mask.width + x] = map.values[row * map.width + column]!;
    }
  const sorted = values.slice().sort();
  const limit = sorted[Math.max(0, sorted.length - Math.max(1, Math.round(share * sorted.length)))]!;
  mask.on.fill(0);
  values.forEach((value, i) => {
    if (value > 0 && value >= limit) mask.on[i] = 1;
  });
}

/** A picture's bright part, such as a finding's region, as a mask of this size. */
export async function fromPicture(mask: Mask, url: string): Promise<void> {
  const picture = new Image();
  picture.src = url;
  await picture.decode();
  const canvas = document.createElement("canvas");
  canvas.width = mask.width;
  canvas.height = mask.height;
  const pen = canvas.getContext("2d")!;
  pen.drawImage(picture, 0, 0, mask.width, mask.height);
  const { data } = pen.getImageData(0, 0, mask.width, mask.height);
  for (let i = 0; i < mask.on.length; i++) mask.on[i] = data[4 * i]! > 127 ? 1 : 0;
}
