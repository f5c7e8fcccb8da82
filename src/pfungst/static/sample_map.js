// The map of samples in a notebook: a scatter on a canvas, of which a lasso, a rectangle or keys select samples.
// Plain JavaScript without network, for anywidget: `points` comes from Python, `selected` (ids) goes both ways.

const PAD = 14;
const SHAPES = ["circle", "square", "triangle", "diamond", "cross", "down"];

// Whether the map stands on a dark ground: then the notebook, whatever its theme, writes in a light colour.
function isDark(element) {
  const [r, g, b] = getComputedStyle(element).color.match(/[\d.]+/g).map(Number);
  return 0.299 * r + 0.587 * g + 0.114 * b > 127;
}

function make(tag, parent, properties = {}) {
  const element = Object.assign(document.createElement(tag), properties);
  parent.append(element);
  return element;
}

function trace(context, shape, x, y, r) {
  context.beginPath();
  if (shape === "circle") context.arc(x, y, r, 0, 2 * Math.PI);
  else if (shape === "square") context.rect(x - r, y - r, 2 * r, 2 * r);
  else if (shape === "cross") {
    const t = r / 2.4;
    const corners = [[-t, -r], [t, -r], [t, -t], [r, -t], [r, t], [t, t], [t, r], [-t, r], [-t, t], [-r, t], [-r, -t], [-t, -t]];
    corners.forEach(([dx, dy], i) => (i ? context.lineTo(x + dx, y + dy) : context.moveTo(x + dx, y + dy)));
    context.closePath();
  } else {
    const s = 1.3 * r;
    const corners = { triangle: [[0, -s], [s, s * 0.8], [-s, s * 0.8]], down: [[0, s], [s, -s * 0.8], [-s, -s * 0.8]],
                      diamond: [[0, -s], [s, 0], [0, s], [-s, 0]] }[shape];
    corners.forEach(([dx, dy], i) => (i ? context.lineTo(x + dx, y + dy) : context.moveTo(x + dx, y + dy)));
    context.closePath();
  }
}

function inside(polygon, x, y) {
  let odd = false;
  for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
    const [xi, yi] = polygon[i], [xj, yj] = polygon[j];
    if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) odd = !odd;
  }
  return odd;
}

function render({ model, el }) {
  const root = make("div", el, { className: "pfungst-map" });
  const bar = make("div", root, { className: "pfungst-bar" });
  const title = make("b", bar);
  const tools = make("span", bar);
  tools.setAttribute("role", "group");
  tools.setAttribute("aria-label", "what dragging does");
  const canvas = make("canvas", root, { tabIndex: 0 });
  canvas.setAttribute("role", "application");
  const legend = make("div", root, { className: "pfungst-bar" });
  const status = make("div", root, { className: "pfungst-status" });
  status.setAttribute("role", "status");
  status.setAttribute("aria-live", "polite");
  const context = canvas.getContext("2d");

  let mode = "lasso", dark = false, drag = null, cursor = -1, places = [], selected = new Set();
  const points = () => model.get("points");

  const buttons = {};
  for (const name of ["lasso", "rectangle"]) {
    buttons[name] = make("button", tools, { type: "button", textContent: name });
    buttons[name].onclick = () => { mode = name; showMode(); };
  }
  make("button", tools, { type: "button", textContent: "clear" }).onclick = () => select([], "only");
  function showMode() {
    for (const [name, button] of Object.entries(buttons)) button.setAttribute("aria-pressed", String(name === mode));
  }

  function colour(group) {
    return group < 0 ? points().rest[dark ? 1 : 0] : points().groups[group].colours[dark ? 1 : 0];
  }
  const nameOf = (i) => (points().group[i] < 0 ? "" : points().groups[points().group[i]].name);

  function lay() {
    const { x, y } = points();
    const width = canvas.clientWidth, height = canvas.clientHeight, ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const fit = (values, length) => {
      const low = Math.min(...values), span = Math.max(...values) - low || 1;
      return values.map((v) => PAD + ((v - low) / span) * (length - 2 * PAD));
    };
    const xs = fit(x, width), ys = fit(y, height);
    places = xs.map((value, i) => [value, ys[i]]);
    draw();
  }

  function draw() {
    const { group, ids } = points();
    dark = isDark(root);
    const ink = dark ? "#fff" : "#111";
    context.clearRect(0, 0, canvas.clientWidth, canvas.clientHeight);
    // The rest below, then groups, then what is selected.
    const rank = (i) => (selected.has(ids[i]) ? 2 : group[i] < 0 ? 0 : 1);
    const order = places.map((_, i) => i).sort((a, b) => rank(a) - rank(b) || a - b);
    for (const i of order) {
      const [x, y] = places[i], chosen = selected.has(ids[i]);
      context.globalAlpha = selected.size && !chosen ? 0.5 : 1;
      context.fillStyle = colour(group[i]);
      trace(context, group[i] < 0 ? "circle" : SHAPES[group[i] % SHAPES.length], x, y, group[i] < 0 ? 3 : 4.2);
      context.fill();
      if (chosen) { context.strokeStyle = ink; context.lineWidth = 1.5; context.stroke(); }
    }
    context.globalAlpha = 1;
    if (cursor >= 0) {
      context.strokeStyle = ink; context.lineWidth = 2;
      context.beginPath(); context.arc(...places[cursor], 9, 0, 2 * Math.PI); context.stroke();
    }
    if (drag && drag.path.length > 1) {
      context.strokeStyle = ink; context.lineWidth = 1.2; context.setLineDash([5, 4]);
      context.beginPath();
      outline().forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
      context.closePath(); context.stroke(); context.setLineDash([]);
    }
  }

  function outline() {
    if (mode === "lasso") return drag.path;
    const [[x0, y0], [x1, y1]] = [drag.path[0], drag.path[drag.path.length - 1]];
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]];
  }

  function tell(prefix = "") {
    const total = points().ids.length;
    status.textContent = `${prefix}${selected.size} of ${total} samples selected`;
  }
  function tellCursor() {
    const i = cursor, name = nameOf(i);
    const id = points().ids[i];
    tell(`${id}${name ? `, ${name}` : ""}${selected.has(id) ? ", selected" : ""}; `);
  }

  // how: "only", "add", "remove".  Ids go to Python in the order of the samples.
  function select(chosen, how) {
    const next = new Set(how === "only" ? [] : selected);
    for (const id of chosen) how === "remove" ? next.delete(id) : next.add(id);
    selected = next;
    model.set("selected", points().ids.filter((id) => next.has(id)));
    model.save_changes();
    tell();
    draw();
  }
  const howOf = (event) => (event.altKey ? "remove" : event.shiftKey ? "add" : "only");
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left - canvas.clientLeft, event.clientY - box.top - canvas.clientTop];
  };
  function nearest([x, y], most = Infinity) {
    let best = -1, least = most * most;
    places.forEach(([px, py], i) => {
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < least) { least = distance; best = i; }
    });
    return best;
  }

  canvas.onpointerdown = (event) => {
    if (event.button) return;
    drag = { path: [at(event)] };
    try { canvas.setPointerCapture(event.pointerId); } catch { /* a pointer that is gone already */ }
    canvas.focus({ preventScroll: true });
    event.preventDefault();
  };
  canvas.onpointermove = (event) => {
    if (drag) {
      drag.path.push(at(event));
      draw();
      return;
    }
    const found = nearest(at(event), 12);
    if (found !== cursor) {
      cursor = found;
      found < 0 ? tell() : tellCursor();
      draw();
    }
  };
  canvas.onpointerup = (event) => {
    if (!drag) return;
    drag.path.push(at(event));
    const [x0, y0] = drag.path[0];
    const far = drag.path.some(([x, y]) => Math.hypot(x - x0, y - y0) > 4);
    const area = outline();
    drag = null;
    if (far) {
      select(points().ids.filter((_, i) => inside(area, ...places[i])), howOf(event));
    } else {
      const found = nearest([x0, y0], 12);
      const id = found < 0 ? null : points().ids[found];
      select(id === null ? [] : [id], id !== null && event.shiftKey && selected.has(id) ? "remove" : howOf(event));
    }
  };
  canvas.onpointercancel = () => { drag = null; draw(); };

  // Arrow keys go to the nearest sample within 45 degrees of their direction; space selects it.
  const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.onkeydown = (event) => {
    const arrow = ARROWS[event.key];
    if (arrow) {
      if (cursor < 0) cursor = nearest([canvas.clientWidth / 2, canvas.clientHeight / 2]);
      else {
        const [x, y] = places[cursor];
        let best = -1, least = Infinity;
        places.forEach(([px, py], i) => {
          const along = (px - x) * arrow[0] + (py - y) * arrow[1];
          const across = Math.abs((px - x) * arrow[1]) + Math.abs((py - y) * arrow[0]);
          if (along > 0 && across <= along && along + 2 * across < least) { least = along + 2 * across; best = i; }
        });
        if (best >= 0) cursor = best;
      }
      if (cursor >= 0) { draw(); tellCursor(); }
    } else if (event.key === " " && cursor >= 0) {
      const id = points().ids[cursor];
      select([id], selected.has(id) ? "remove" : "add");
      tellCursor();
    } else if (event.key === "Escape") {
      drag = null;
      select([], "only");
    } else if (event.key === "a" && (event.ctrlKey || event.metaKey)) {
      select(points().ids, "only");
    } else return;
    event.preventDefault();
    event.stopPropagation(); // else the notebook takes it for a command of its own
  };

  function show() {
    const given = points();
    title.textContent = given.title;
    canvas.setAttribute("aria-label", `${given.title}. Arrow keys go from sample to sample, space selects, escape clears.`);
    legend.replaceChildren();
    cursor = -1;
    dark = isDark(root);
    given.groups.forEach((one, number) => {
      const button = make("button", legend, { type: "button", title: `select ${one.name}` });
      const mark = make("canvas", button, { width: 28, height: 28 });
      mark.setAttribute("aria-hidden", "true");
      const brush = mark.getContext("2d");
      brush.scale(2, 2);
      brush.fillStyle = colour(number);
      trace(brush, SHAPES[number % SHAPES.length], 7, 7, 4.6);
      brush.fill();
      const also = new Set(one.also ?? []); // members that have the colour of another group
      const own = also.size ? `, ${one.count - also.size} in this colour` : "";
      make("span", button, { textContent: `${one.name} (${one.count}${own})` });
      button.onclick = (event) => select(given.ids.filter((_, i) => given.group[i] === number || also.has(i)), howOf(event));
    });
    read();
    lay();
  }
  function read() {
    selected = new Set(model.get("selected"));
    tell();
    draw();
  }

  model.on("change:points", show);
  model.on("change:selected", read);
  const watch = new ResizeObserver(lay);
  showMode();
  show();
  watch.observe(canvas);
  return () => {
    watch.disconnect();
    model.off("change:points", show);
    model.off("change:selected", read);
  };
}

export default { render };
