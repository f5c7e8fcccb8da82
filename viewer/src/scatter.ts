// Points in WebGL2: one buffer of positions, one of colour codes, one of flags; what is seen is a matter of a few uniforms.

export interface Camera {
  x: number; // the middle of the canvas, in units of the layout
  y: number;
  height: number; // of the canvas, in these units
}

export const GREY = 1; // flags of a point: it does not pass the filters,
export const CHOSEN = 2; // it is selected

const VERTEX = `#version 300 es
in vec2 place;
in uint code;
in uint flag;
uniform vec2 middle, scale;
uniform float size, faded;
uniform uint stage;
uniform vec3 grey;
uniform sampler2D palette;
out vec4 colour;
void main() {
  uint own = (flag & 1u) != 0u ? 0u : (flag & 2u) != 0u ? 2u : 1u;
  gl_Position = own == stage ? vec4((place - middle) * scale, 0.0, 1.0) : vec4(2.0, 2.0, 2.0, 1.0);
  gl_PointSize = size;
  vec3 mine = texelFetch(palette, ivec2(int(code), 0), 0).rgb;
  colour = stage == 0u ? vec4(grey, 0.35) : vec4(mine, faded);
}`;
const FRAGMENT = `#version 300 es
precision mediump float;
in vec4 colour;
uniform float round;
out vec4 drawn;
void main() {
  vec2 from = 2.0 * gl_PointCoord - 1.0;
  if (round > 0.5 && dot(from, from) > 1.0) discard;
  drawn = vec4(colour.rgb * colour.a, colour.a);
}`;
const BUFFERS = ["place", "code", "flag"] as const;

export class Scatter {
  camera: Camera = { x: 0, y: 0, height: 1 };
  rows = new Uint32Array(0); // samples that are on the map
  private places = new Float32Array(0);
  private codes = new Uint8Array(0);
  private flags = new Uint8Array(0);
  private palette = new Uint8Array(4 * 256);
  private grey: [number, number, number] = [0.6, 0.6, 0.6];
  private stages = [false, true, false];
  private gl: WebGL2RenderingContext | null;
  private program: WebGLProgram | null = null;
  private buffers = new Map<string, WebGLBuffer>();
  private uniforms = new Map<string, WebGLUniformLocation | null>();
  private waiting = 0;
  private index: Index | null = null;
  drawn: (() => void) | undefined; // called after each picture

  constructor(readonly canvas: HTMLCanvasElement) {
    this.gl = canvas.getContext("webgl2", { antialias: false, premultipliedAlpha: true, alpha: true });
    canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
    canvas.addEventListener("webglcontextrestored", () => {
      this.begin();
      this.redraw();
    });
    this.begin();
  }

  get usable(): boolean {
    return this.gl !== null;
  }

  /** Make what lives on the graphics card: at first, and after it was lost. */
  private begin(): void {
    const gl = this.gl;
    if (!gl || gl.isContextLost()) return;
    const program = gl.createProgram()!;
    for (const [kind, text] of [
      [gl.VERTEX_SHADER, VERTEX],
      [gl.FRAGMENT_SHADER, FRAGMENT],
    ] as const) {
      const shader = gl.createShader(kind)!;
      gl.shaderSource(shader, text);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    gl.useProgram(program);
    this.program = program;
    for (const name of ["middle", "scale", "size", "faded", "stage", "grey", "round", "palette"])
      this.uniforms.set(name, gl.getUniformLocation(program, name));
    for (const name of BUFFERS) {
      const buffer = gl.createBuffer()!;
      this.buffers.set(name, buffer);
      gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
      const at = gl.getAttribLocation(program, name);
      gl.enableVertexAttribArray(at);
      if (name === "place") gl.vertexAttribPointer(at, 2, gl.FLOAT, false, 0, 0);
      else gl.vertexAttribIPointer(at, 1, gl.UNSIGNED_BYTE, 0, 0);
    }
    gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.NEAREST);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, gl.NEAREST);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    this.send("place", this.places);
    this.send("code", this.codes);
    this.send("flag", this.flags);
    this.sendPalette();
  }

  private send(name: (typeof BUFFERS)[number], values: ArrayBufferView<ArrayBuffer>): void {
    if (!this.gl || !this.program) return;
    this.gl.bindBuffer(this.gl.ARRAY_BUFFER, this.buffers.get(name)!);
    this.gl.bufferData(this.gl.ARRAY_BUFFER, values, this.gl.DYNAMIC_DRAW);
  }

  private sendPalette(): void {
    const gl = this.gl;
    if (gl) gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, 256, 1, 0, gl.RGBA, gl.UNSIGNED_BYTE, this.palette);
  }

  /** x, y of every sample; those that are nan are not on the map. */
  setPoints(points: Float32Array): void {
    const count = points.length / 2;
    let on = 0;
    const rows = new Uint32Array(count);
    for (let row = 0; row < count; row++) if (points[2 * row] === points[2 * row]) rows[on++] = row;
    this.rows = rows.slice(0, on);
    this.places = new Float32Array(2 * on);
    for (let i = 0; i < on; i++) {
      this.places[2 * i] = points[2 * this.rows[i]!]!;
      this.places[2 * i + 1] = points[2 * this.rows[i]! + 1]!;
    }
    this.codes = new Uint8Array(on);
    this.flags = new Uint8Array(on);
    this.index = null;
    this.send("place", this.places);
    this.send("code", this.codes);
    this.send("flag", this.flags);
    this.redraw();
  }

  /** Places in the palette, by sample. */
  setCodes(codes: Uint8Array): void {
    for (let i = 0; i < this.rows.length; i++) this.codes[i] = codes[this.rows[i]!]!;
    this.send("code", this.codes);
    this.redraw();
  }

  /** Flags by sample. */
  setFlags(flags: Uint8Array): void {
    const there = [false, false, false];
    for (let i = 0; i < this.rows.length; i++) {
      const flag = flags[this.rows[i]!]!;
      this.flags[i] = flag;
      there[flag & GREY ? 0 : flag & CHOSEN ? 2 : 1] = true;
    }
    this.stages = there;
    this.send("flag", this.flags);
    this.redraw();
  }

  /** Colours as (r, g, b), 0 to 255. */
  setPalette(colours: [number, number, number][], grey: [number, number, number]): void {
    colours.slice(0, 256).forEach((colour, i) => this.palette.set([...colour, 255], 4 * i));
    this.grey = grey.map((value) => value / 255) as [number, number, number];
    this.sendPalette();
    this.redraw();
  }

  // ---- what is seen ---------------------------------------------------------------------------------------------------

  get pixels(): number {
    return (this.canvas.clientHeight || 1) / this.camera.height; // CSS pixels a unit
  }

  /** The camera that shows all points. */
  whole(): Camera {
    let [left, right, low, high] = [Infinity, -Infinity, Infinity, -Infinity];
    for (let i = 0; i < this.places.length; i += 2) {
      const x = this.places[i]!;
      const y = this.places[i + 1]!;
      if (x < left) left = x;
      if (x > right) right = x;
      if (y < low) low = y;
      if (y > high) high = y;
    }
    if (left > right) return { x: 0, y: 0, height: 1 };
    const shape = (this.canvas.clientWidth || 1) / (this.canvas.clientHeight || 1);
    const height = Math.max(high - low, (right - left) / shape, 1e-9) * 1.08;
    return { x: (left + right) / 2, y: (low + high) / 2, height };
  }

  toScreen(x: number, y: number): [number, number] {
    const { canvas, camera, pixels } = this;
    return [canvas.clientWidth / 2 + (x - camera.x) * pixels, canvas.clientHeight / 2 - (y - camera.y) * pixels];
  }

  fromScreen(x: number, y: number): [number, number] {
    const { canvas, camera, pixels } = this;
    return [camera.x + (x - canvas.clientWidth / 2) / pixels, camera.y - (y - canvas.clientHeight / 2) / pixels];
  }

  /** The point nearest to a place on the screen, at most ``reach`` pixels from it and not grey; -1: none. */
  nearest(x: number, y: number, reach: number): { row: number; at: [number, number] } | undefined {
    this.index ??= new Index(this.places);
    const [px, py] = this.fromScreen(x, y);
    const found = this.index.nearest(px, py, reach / this.pixels, (i) => !(this.flags[i]! & GREY));
    if (found < 0) return undefined;
    return { row: this.rows[found]!, at: [this.places[2 * found]!, this.places[2 * found + 1]!] };
  }

  redraw(): void {
    if (!this.waiting) this.waiting = requestAnimationFrame(() => this.draw());
  }

  private draw(): void {
    this.waiting = 0;
    const { gl, canvas, camera } = this;
    if (!gl || !this.program || gl.isContextLost()) return;
    const ratio = devicePixelRatio || 1;
    const wide = Math.max(1, Math.round(canvas.clientWidth * ratio));
    const high = Math.max(1, Math.round(canvas.clientHeight * ratio));
    if (canvas.width !== wide || canvas.height !== high) {
      canvas.width = wide;
      canvas.height = high;
    }
    gl.viewport(0, 0, wide, high);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    const count = this.rows.length;
    const closer = Math.max(1, this.wholeHeight / camera.height);
    const size = Math.min(14, Math.max(1.4, 9.2 - 1.3 * Math.log10(count + 1)) * closer ** 0.35) * ratio;
    const at = (name: string) => this.uniforms.get(name) ?? null;
    gl.uniform2f(at("middle"), camera.x, camera.y);
    gl.uniform2f(at("scale"), (2 * high) / wide / camera.height, 2 / camera.height);
    gl.uniform3f(at("grey"), ...this.grey);
    const some = this.stages[2]!;
    const solid = count > 200_000 ? 0.65 : 0.85;
    this.stages.forEach((there, stage) => {
      if (!there || !count) return;
      const larger = stage === 2 ? size + 1.5 * ratio : size;
      gl.uniform1ui(at("stage"), stage);
      gl.uniform1f(at("faded"), stage === 1 && some ? 0.3 : stage === 2 ? 1 : solid);
      gl.uniform1f(at("size"), larger);
      gl.uniform1f(at("round"), larger > 3 ? 1 : 0);
      gl.drawArrays(gl.POINTS, 0, count);
    });
    this.drawn?.();
  }

  private get wholeHeight(): number {
    if (this.knownFor !== this.places) {
      this.knownFor = this.places;
      this.knownHeight = this.whole().height;
    }
    return this.knownHeight;
  }
  private knownFor: Float32Array | null = null;
  private knownHeight = 1;

  end(): void {
    cancelAnimationFrame(this.waiting);
    this.gl?.getExtension("WEBGL_lose_context")?.loseContext();
    this.gl = null;
  }
}

/** Points by the cell of a grid that they lie in, so that the nearest is found among few. */
class Index {
  private side: number; // cells in a row
  private starts: Uint32Array;
  private members: Uint32Array;
  private left = Infinity;
  private low = Infinity;
  private cell: number;

  constructor(private places: Float32Array) {
    const count = places.length / 2;
    let right = -Infinity;
    let high = -Infinity;
    for (let i = 0; i < count; i++) {
      this.left = Math.min(this.left, places[2 * i]!);
      right = Math.max(right, places[2 * i]!);
      this.low = Math.min(this.low, places[2 * i + 1]!);
      high = Math.max(high, places[2 * i + 1]!);
    }
    this.side = Math.max(1, Math.min(1024, Math.ceil(Math.sqrt(count / 4))));
    this.cell = Math.max(right - this.left, high - this.low, 1e-9) / this.side;
    this.starts = new Uint32Array(this.side * this.side + 1);
    for (let i = 0; i < count; i++) this.starts[this.place(i) + 1]!++;
    for (let i = 0; i < this.side * this.side; i++) this.starts[i + 1]! += this.starts[i]!;
    const next = this.starts.slice();
    this.members = new Uint32Array(count);
    for (let i = 0; i < count; i++) this.members[next[this.place(i)]!++] = i;
  }

  private across(value: number, from: number): number {
    return Math.min(this.side - 1, Math.max(0, Math.floor((value - from) / this.cell)));
  }

  private place(i: number): number {
    const row = this.across(this.places[2 * i + 1]!, this.low);
    return row * this.side + this.across(this.places[2 * i]!, this.left);
  }

  nearest(x: number, y: number, reach: number, passes: (i: number) => boolean): number {
    let found = -1;
    let least = reach * reach;
    const last = this.across(x + reach, this.left);
    const top = this.across(y + reach, this.low);
    for (let row = this.across(y - reach, this.low); row <= top; row++)
      for (let column = this.across(x - reach, this.left); column <= last; column++) {
        const cell = row * this.side + column;
        for (let k = this.starts[cell]!; k < this.starts[cell + 1]!; k++) {
          const i = this.members[k]!;
          const far = (this.places[2 * i]! - x) ** 2 + (this.places[2 * i + 1]! - y) ** 2;
          if (far <= least && passes(i)) {
            least = far;
            found = i;
          }
        }
      }
    return found;
  }
}
