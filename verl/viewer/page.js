"use strict";
// Texts of a run reach the page as text nodes and attributes' values alone, never as markup.

// ---------------------------------------------------------------- small helpers

const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const known = (value) => value !== null && value !== undefined && !Number.isNaN(value);

/** A number as people read it: four digits, and a dash for one that is not known. */
function shown(value) {
  if (!known(value)) return "–";
  const text = Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4)));
  return text.replaceAll("-", "−");
}

/** An element with properties, or attributes where it has no such property, and children. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function draw(tag, attributes, text = "") {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

/** The bytes of a part of the page's data. */
async function unpack(name) {
  const text = atob(byId(`data-${name}`).textContent);
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const unpackJson = async (name) => JSON.parse(new TextDecoder().decode(await unpack(name)));

// ---------------------------------------------------------------- what is shown, and the address that says so

const START = {
  view: "curves", metrics: "", kind: "", step: "", source: "", teacher: "", items: "", least: "", most: "", text: "",
  sort: "largest", order: "", open: "", with: "", colour: "",
};
const FILTERS = ["kind", "step", "source", "teacher", "items", "least", "most", "text", "sort", "order"];
let state = { ...START };
let answers = []; // all, newest step first
let byKey = new Map(); // "training.4.7" to an answer
let found = []; // those that the filters leave, in order
let chosen = 0; // place in `found` that j and k move

function fromAddress() {
  const given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  return { ...START, ...Object.fromEntries(Object.entries(given).filter(([key]) => key in START)) };
}

/** Changes what is shown, and the address with it; `asStep`: the browser's Back undoes it. */
function show(change, asStep = false) {
  const next = { ...state, ...change };
  const told = Object.entries(next).filter(([key, value]) => value !== START[key]);
  history[asStep ? "pushState" : "replaceState"](null, "", `#${new URLSearchParams(told)}`);
  render(next);
}

function render(next) {
  const before = state;
  const changed = (...keys) => before === next || keys.some((key) => before[key] !== next[key]);
  state = next;
  document.body.dataset.view = state.view;
  document.body.toggleAttribute("data-open", byKey.has(state.open));
  for (const button of document.querySelectorAll("nav button"))
    button.setAttribute("aria-pressed", String(button.dataset.view === state.view));
  for (const control of document.querySelectorAll("[data-key]"))
    if (control.value !== state[control.dataset.key]) control.value = state[control.dataset.key];
  if (changed("metrics")) drawCharts();
  if (changed(...FILTERS)) findAnswers();
  if (changed("open")) chosen = Math.max(0, found.indexOf(byKey.get(state.open)));
  if (changed("view", "open", ...FILTERS)) scrollToChosen();
  byId("previous").disabled = chosen <= 0;
  byId("next").disabled = chosen >= found.length - 1;
  if (changed("open", "with", "colour")) drawAnswer();
}

// ---------------------------------------------------------------- curves

const MAIN = [/^val\//, /^distill\/(reverse_kl|extend_seq_ratio|extend_token_ratio|entropy)$/,
  /^actor\/(distill_loss|distill_divergence|pg_loss|grad_norm)$/, /^response_length\/(mean|max|clip_ratio)$/,
  /^critic\/score\/mean$/, /^timing_s\/step$/];
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [320, 150, 46, 10, 8, 22];
let curves = {};

/** Metrics to draw: those whose name has every word of the filter, else the main ones, else all. */
function chosenMetrics() {
  const names = Object.keys(curves), words = state.metrics.toLowerCase().split(/\s+/).filter(Boolean);
  if (words.length) return names.filter((name) => words.every((word) => name.toLowerCase().includes(word)));
  const main = names.filter((name) => MAIN.some((pattern) => pattern.test(name)));
  return main.length ? main : names;
}

const prefixOf = (name) => name.slice(0, name.indexOf("/") + 1) || name;

/** Names by prefix: validation and distillation first, then by the alphabet. */
function grouped(names) {
  const order = ["val/", "distill/", "actor/", "response_length/", "critic/"];
  const place = (prefix) => (order.indexOf(prefix) + order.length + 1) % (order.length + 1);
  const groups = new Map();
  for (const name of [...names].sort()) groups.set(prefixOf(name), [...(groups.get(prefixOf(name)) ?? []), name]);
  return new Map([...groups].sort(([a], [b]) => place(a) - place(b) || (a < b ? -1 : 1)));
}

function drawGroups() {
  const chip = (text, metrics) => make("button", { type: "button", onclick: () => show({ metrics }), value: metrics }, text);
  const chips = [...grouped(Object.keys(curves))].map(([prefix, names]) => chip(`${prefix} ${names.length}`, prefix));
  byId("groups").replaceChildren(chip("main", ""), ...chips);
}

function drawCharts() {
  const names = chosenMetrics(), groups = [...grouped(names)];
  for (const chip of byId("groups").children) chip.setAttribute("aria-pressed", String(chip.value === state.metrics));
  const grid = (some) => make("div", { className: "grid" }, ...some.map(chart));
  byId("charts").replaceChildren(...(state.metrics ? // the main ones are few of each group
    groups.flatMap(([prefix, some]) => [make("h2", {}, prefix.replace(/\/$/, "")), grid(some)]) :
    [grid(groups.flatMap(([, some]) => some))]));
  if (!names.length)
    byId("charts").append(make("p", { className: "soft" }, state.metrics ? "No metric has that name." : "There are no metrics."));
}

/** Round numbers of a scale from low to high. */
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * power).find((size) => size >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

/** Scales of a chart: from a step or a value to its place. */
function scales(steps, values) {
  const finite = values.filter(known);
  let low = Math.min(...finite), high = Math.max(...finite);
  if (low > 0 && low < 0.6 * high) low = 0; // most metrics are amounts: their scale begins at 0
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const [from, to] = [steps[0], Math.max(steps.at(-1), steps[0] + 1)];
  return {
    low, high, from, to,
    x: (step) => LEFT + ((step - from) / (to - from)) * (WIDTH - LEFT - RIGHT),
    y: (value) => HEIGHT - BOTTOM - ((value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM),
  };
}

function gridOf({ low, high, from, to, x, y }) {
  const across = ticks(low, high, 5).flatMap((value) => [
    draw("line", { class: "rule", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }),
    draw("text", { x: LEFT - 5, y: y(value) + 4, "text-anchor": "end" }, short(value))]);
  const steps = ticks(from, to, 4).filter(Number.isInteger);
  return [...across, ...steps.map((step) => draw("text", { x: x(step), y: HEIGHT - 6, "text-anchor": "middle" }, shown(step)))];
}

/** A value beside the axis, at most some six signs. */
function short(value) {
  const size = Math.abs(value);
  if (size >= 1e4 || (size > 0 && size < 1e-3)) return value.toExponential().replace("e+", "e").replaceAll("-", "−");
  return String(value).replace("-", "−");
}

/** A chart of one metric, whose points the pointer and the arrow keys read. */
function chart(name) {
  const [steps, values] = curves[name], points = steps.map((_, i) => i).filter((i) => known(values[i]));
  const reading = make("span", { ariaLive: "polite" }), caption = make("figcaption", {}, name, reading);
  if (!points.length) return (reading.textContent = "never a finite number"), make("figure", {}, caption);
  const frame = scales(steps, values), last = points.at(-1);
  let path = "", pen = "M";
  for (const [i, value] of values.entries()) {
    if (known(value)) path += `${pen}${frame.x(steps[i]).toFixed(1)} ${frame.y(value).toFixed(1)}`;
    pen = known(value) ? "L" : "M"; // a gap where the run had no finite number
  }
  const dots = points.length > 40 ? [] : points.map((i) =>
    draw("circle", { class: "dot", cx: frame.x(steps[i]), cy: frame.y(values[i]), r: 2 }));
  const here = draw("circle", { class: "here", r: 4 });
  const drawing = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: 0, role: "img" });
  drawing.setAttribute("aria-label", `${name}: ${shown(values[points[0]])} at step ${steps[points[0]]}, ` +
    `${shown(values[last])} at step ${steps[last]}; arrow keys read the points`);
  let place = points.length - 1;
  const read = (to, marked = true) => {
    place = Math.min(points.length - 1, Math.max(0, to));
    const i = points[place];
    reading.textContent = `step ${steps[i]}: ${shown(values[i])}`;
    here.setAttribute("cx", frame.x(steps[i]));
    here.setAttribute("cy", frame.y(values[i]));
    here.setAttribute("visibility", marked ? "visible" : "hidden");
  };
  drawing.append(...gridOf(frame), draw("path", { class: "curve", d: path }), ...dots, here);
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * WIDTH;
    const far = (k) => Math.abs(frame.x(steps[points[k]]) - at);
    read(points.reduce((best, _, k) => (far(k) < far(best) ? k : best), 0));
  });
  drawing.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move) event.preventDefault(), read(place + move);
  });
  for (const end of ["pointerleave", "blur"]) drawing.addEventListener(end, () => read(points.length - 1, false));
  read(place, false);
  return make("figure", {}, caption, drawing);
}

// ---------------------------------------------------------------- the list of answers

const ROW = 54; // height of a row, as the styles have it

/** Answers from columns, and the choices of the filters. */
function takeAnswers({ prompts, ...columns }) {
  const names = Object.keys(columns);
  answers = columns.prompt.map((_, i) => Object.fromEntries(names.map((name) => [name, columns[name][i]])));
  for (const answer of answers) {
    answer.key = `${answer.kind}.${answer.step}.${answer.row}`;
    answer.prompt = prompts[answer.prompt];
    answer.searched = `${answer.text}\n${answer.prompt ?? ""}`.toLowerCase();
  }
  byKey = new Map(answers.map((answer) => [answer.key, answer]));
  byId("answer-count").textContent = shown(answers.length);
  const distinct = (key) => [...new Set(answers.map((answer) => String(answer[key])))];
  const choices = (key, all, values) =>
    refill(key, [option("", all), ...values.filter(Boolean).map((value) => option(value, value))]);
  choices("kind", "training and validation", distinct("kind").sort());
  choices("step", "all steps", distinct("step"));
  choices("source", "all sources", distinct("source").sort());
  choices("teacher", "all teachers", distinct("teacher").sort());
}

const control = (key) => document.querySelector(`[data-key="${key}"]`);
const option = (value, text) => make("option", { value }, text);

function refill(key, options) {
  control(key).replaceChildren(...options);
  control(key).value = state[key];
}

function findAnswers() {
  const { text, least, most, items } = state, words = text.toLowerCase();
  const same = ["kind", "step", "source", "teacher"].filter((key) => state[key]);
  found = answers.filter((answer) =>
    same.every((key) => String(answer[key]) === state[key]) &&
    (!least || answer.response_length >= Number(least)) && (!most || answer.response_length <= Number(most)) &&
    (!items || answer.items > 0 === (items === "with")) && (!words || answer.searched.includes(words)));
  const sign = state.order === "up" ? 1 : -1;
  const size = (answer) => (state.sort === "largest" && known(answer.largest) ? Math.abs(answer.largest) : answer[state.sort]);
  // What is not known comes last in both orders; equals stay as they are, newest step first.
  found.sort((a, b) => known(size(b)) - known(size(a)) || (known(size(a)) && sign * (size(a) - size(b))) || 0);
  chosen = Math.max(0, found.indexOf(byKey.get(state.open)));
  byId("rows").style.height = `${found.length * ROW}px`;
  byId("summary").textContent = summaryOf(found);
}

/** How many answers were found, and the mean of each measure over all their trained tokens. */
function summaryOf(some) {
  const means = [...new Set(some.map((answer) => answer.measure))].map((measure) => {
    const of = some.filter((answer) => answer.measure === measure);
    const total = (key) => of.reduce((sum, answer) => sum + (answer[key] ?? 0), 0);
    return total("known") ? `; mean ${nameOf(measure)} ${shown(total("sum") / total("known"))} a trained token` : "";
  });
  return `${shown(some.length)} of ${shown(answers.length)} answers${means.join("")}`;
}

const nameOf = (measure) => (measure === "difference" ? DIFFERENCE : measure);

/** The rows in sight, and no others: thousands of answers stay quick. */
function drawRows() {
  const list = byId("list"), first = Math.max(0, Math.floor(list.scrollTop / ROW) - 5);
  const some = found.slice(first, first + Math.ceil(list.clientHeight / ROW) + 10);
  byId("rows").replaceChildren(...some.map((answer, i) => rowOf(answer, first + i)));
  list.setAttribute("aria-activedescendant", found.length ? `row-${chosen}` : "");
}

function rowOf(answer, place) {
  const row = make("div", { id: `row-${place}`, className: "row", role: "option", ariaSelected: String(place === chosen),
    ariaSetSize: String(found.length), ariaPosInSet: String(place + 1) });
  row.style.top = `${place * ROW}px`;
  row.dataset.place = place;
  const facts = [`step ${answer.step}`,
    known(answer.sum) && `largest ${shown(answer.largest)}, sum ${shown(answer.sum)}`,
    `${shown(answer.response_length)} tokens`, known(answer.score) && `score ${shown(answer.score)}`, answer.source,
    answer.teacher && `teacher ${answer.teacher}`];
  const line = make("div", {}, facts.filter(Boolean).join(" · "));
  if (answer.items) line.prepend(make("span", { className: "mark" }, `${answer.items} item${answer.items > 1 ? "s" : ""}`), " ");
  row.append(make("div", {}, answer.text.replace(/\s+/g, " ").slice(0, 240) || "(empty)"), line);
  return row;
}

function scrollToChosen() {
  const list = byId("list"), top = chosen * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  drawRows();
}

function move(by) {
  if (!found.length) return;
  chosen = Math.min(found.length - 1, Math.max(0, chosen + by));
  if (state.open) show({ open: found[chosen].key, with: "" });
  else scrollToChosen();
}

function openChosen() {
  if (!found[chosen]) return;
  show({ open: found[chosen].key, with: "" }, !state.open);
  byId("answer").focus({ preventScroll: true });
  if (innerWidth < 1000) scrollTo(0, 0);
}

function closeAnswer() {
  show({ open: "", with: "" }, true);
  byId("list").focus();
}

// ---------------------------------------------------------------- numbers of tokens

const NUMBERS = ["student_log_prob", "teacher_log_prob", "signal", "entropy", "extend_mass"];
const DIFFERENCE = "student − teacher";
const COLOURS = { signal: "signal", difference: DIFFERENCE, entropy: "entropy", extend_mass: "item mass" };
const REASONS = {
  trained: "The update learns from it",
  other: "Not trained: the model did not write it, or its agent loop left it out",
  after_item: "Not trained: it stands behind the first item token, which the teacher lacks",
  whole_answer: "Not trained, as no token of this answer: it holds an item token, or its agent loop left it out",
};
const parts = new Map(); // what was unpacked, by kind and step

/** The tokens of all answers of a kind and step. */
function tokensOf(kind, step) {
  const name = `${kind}-${step}`;
  if (!parts.has(name)) parts.set(name, unpack(name).then(readTokens));
  return parts.get(name);
}

/** The reverse of `_packed` in run_data.py: each column lies there with the first bytes of all values first. */
function readTokens(bytes) {
  const start = 4 + new DataView(bytes.buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(bytes.subarray(4, start)));
  const count = (bytes.length - start) / (4 * (1 + NUMBERS.length) + 2);
  let at = start;
  const four = (Type) => {
    const joined = new Uint8Array(4 * count);
    for (let byte = 0; byte < 4; byte++) for (let i = 0; i < count; i++) joined[4 * i + byte] = bytes[at++];
    return new Type(joined.buffer);
  };
  const part = { ...head, place: four(Uint32Array) };
  for (const name of NUMBERS) part[name] = four(Float32Array);
  part.difference = part.student_log_prob.map((value, i) => value - part.teacher_log_prob[i]);
  part.state = bytes.subarray(at, at + count);
  part.item = bytes.subarray(at + count);
  return part;
}

/** Where full colour begins: the 98th percentile of the absolute values, so that one token does not pale all others. */
function rangeOf(values) {
  const sizes = values.filter(Number.isFinite).map(Math.abs).sort();
  return sizes.length ? sizes[Math.min(sizes.length - 1, Math.floor(0.98 * sizes.length))] : 0;
}

// ---------------------------------------------------------------- one answer

/** How a number of an answer's tokens is coloured: its name, and the hues of values above and below 0. Orange is farther
 * from the teacher, who finds the token less likely than the student does; blue is the other way, and an amount. */
function scaleOf(answer) {
  const automatic = answer.measure === "difference" ? "difference" : "signal", number = state.colour || automatic;
  if (number === "signal" && answer.measure === "advantage") return { number, label: "advantage", above: "blue", below: "orange" };
  if (number === "signal") return { number, label: answer.signal_name ?? "signal", above: "orange" };
  if (number === "difference") return { number, label: DIFFERENCE, above: "orange", below: "blue" };
  return { number, label: COLOURS[number], above: number === "entropy" ? "blue" : "violet" };
}

async function drawAnswer() {
  const answer = byKey.get(state.open), asked = state;
  if (!answer) return;
  const same = otherAnswers(answer), other = same.find(({ key }) => key === state.with);
  const both = other ? [answer, other] : [answer];
  const parts = await Promise.all(both.map(({ kind, step }) => tokensOf(kind, step)));
  if (["open", "with", "colour"].some((key) => asked[key] !== state[key])) return; // another one was asked for since
  const scale = scaleOf(answer);
  scale.range = Math.max(...parts.map((part) => rangeOf(part[scale.number])));
  drawAbout(answer, same);
  drawLegend(scale);
  byId("texts").replaceChildren(...both.map((one, i) => columnOf(one, parts[i], scale)));
  showToken();
}

/** Other answers to the same prompt, newest first. */
function otherAnswers({ kind, index, source, key }) {
  if (!index) return [];
  return answers.filter((one) => one.index === index && one.source === source && one.kind === kind && one.key !== key);
}

function drawAbout(answer, same) {
  byId("heading").textContent = [`Step ${answer.step}`, answer.kind, answer.source, answer.teacher && `teacher ${answer.teacher}`,
    answer.index && `prompt ${answer.index}`].filter(Boolean).join(" · ");
  const prompt = answer.prompt ?? `${shown(answer.prompt_length)} tokens, whose text is not beside the record.`;
  byId("prompt").open = prompt.length <= 600;
  byId("prompt").querySelector("summary").textContent = `Prompt, ${shown(answer.prompt_length)} tokens`;
  byId("prompt").querySelector(".text").textContent = prompt;
  byId("expected").hidden = !known(answer.expected);
  byId("expected").querySelector(".text").textContent = answer.expected;
  const automatic = answer.measure === "difference" ? "difference" : "signal";
  const colours = Object.entries(COLOURS).map(([value, text]) =>
    option(value === automatic ? "" : value, (value === "signal" && answer.signal_name) || text));
  refill("colour", colours);
  refill("with", [option("", same.length ? "nothing" : "no other step"), ...same.map((one) => {
    const several = one.step === answer.step || same.filter(({ step }) => step === one.step).length > 1;
    return option(one.key, `step ${one.step}${several ? `, answer ${one.row}` : ""}`);
  })]);
  control("with").disabled = !same.length;
}

const shade = (hue, share) => `color-mix(in srgb, var(--${hue}) ${Math.round(65 * Math.min(1, share))}%, transparent)`;

function drawLegend({ label, above, below, range }) {
  const ramp = make("span", { className: "ramp" });
  ramp.style.background = `linear-gradient(to right, ${below ? `${shade(below, 1)}, ` : ""}transparent, ${shade(above, 1)})`;
  const colours = !range ? `${label}: not recorded here` : make("span", {}, `${label} `, below ? `−${shown(range)}` : "0", ramp,
    `${shown(range)} and beyond`);
  const sample = (className, text) => make("span", { className: `token ${className}` }, text);
  byId("legend").replaceChildren(colours, sample("item", "item token"), sample("untrained", "not trained"));
}

/** One answer's figures and its tokens. */
function columnOf(answer, part, scale) {
  const from = answer.first, to = from + answer.response_length;
  const learns = answer.kind === "validation" ? "would be trained" : "trained";
  const facts = [`step ${answer.step}`, `${shown(answer.response_length)} tokens, ${shown(answer.trained)} ${learns}`,
    known(answer.score) && `score ${shown(answer.score)}`, known(answer.weight_version) && `weights ${answer.weight_version}`,
    answer.uid && `uid ${answer.uid}`];
  const tokens = make("div", { className: "tokens", role: "group", ariaLabel: `Tokens of step ${answer.step}; arrow keys move` });
  for (let i = from; i < to; i++) tokens.append(tokenOf(part, i, scale));
  if (tokens.firstChild) tokens.firstChild.tabIndex = 0;
  const touch = (event) => event.target.closest(".token") && showToken(part, event.target.closest(".token"), answer);
  for (const kind of ["pointerover", "focusin", "click"]) tokens.addEventListener(kind, touch);
  tokens.addEventListener("keydown", stepThrough);
  return make("div", { className: "answer" }, make("p", {}, facts.filter(Boolean).join(" · ")),
    make("p", { className: "sums" }, sumText(part, from, to, scale)), tokens);
}

/** Sum and mean of the number that colours the tokens, over those that are trained and have it. */
function sumText(part, from, to, { number, label }) {
  let sum = 0, count = 0;
  for (let i = from; i < to; i++) {
    if (part.states[part.state[i]] !== "trained" || !Number.isFinite(part[number][i])) continue;
    sum += part[number][i];
    count += 1;
  }
  if (!count) return `${label}: not known at its trained tokens`;
  return `${label}: sum ${shown(sum)}, mean ${shown(sum / count)} over ${shown(count)} trained tokens`;
}

function tokenOf(part, i, { number, range, above, below }) {
  const value = part[number][i], state = part.states[part.state[i]];
  const token = make("span", { className: "token", tabIndex: -1 }, ...visible(part.texts[part.place[i]]));
  token.classList.toggle("item", part.item[i] > 0);
  token.classList.toggle("untrained", state !== "trained");
  token.dataset.place = i;
  if (range && value) token.style.background = shade(value > 0 ? above : below ?? "blue", Math.abs(value) / range);
  return token;
}

/** A token's text with signs for what has none: spaces, ends of lines, nothing at all. */
function visible(text) {
  if (!text) return [make("i", {}, "∅")];
  return text.split(/([ \n\t\r])/).filter(Boolean).flatMap((piece) => {
    if (piece === " ") return [make("i", { className: "space" }, " ")];
    if (piece === "\t") return [make("i", {}, "→"), "\t"];
    if (piece === "\n") return [make("i", {}, "↵"), "\n"];
    return [piece.replace(/[\u0000-\u001f]/g, (control) => String.fromCharCode(0x2400 + control.charCodeAt(0)))];
  });
}

/** Arrow keys among an answer's tokens; one of them alone is a stop of the Tab key. */
function stepThrough(event) {
  const token = event.target.closest(".token");
  const next = { ArrowRight: token?.nextSibling, ArrowLeft: token?.previousSibling }[event.key];
  if (!next) return;
  event.preventDefault();
  [token.tabIndex, next.tabIndex] = [-1, 0];
  next.focus();
}

/** All numbers of a token in the panel below. */
function showToken(part, token, answer) {
  for (const old of document.querySelectorAll(".token.here")) old.classList.remove("here");
  if (!token) return byId("panel").replaceChildren(make("p", { className: "soft" }, "Point at a token, or move to it with Tab and the arrow keys."));
  token.classList.add("here");
  const i = Number(token.dataset.place), state = part.states[part.state[i]];
  const facts = { token: JSON.stringify(part.texts[part.place[i]]), id: part.ids[part.place[i]],
    place: `${i - answer.first + 1} of ${answer.response_length}`, student: shown(part.student_log_prob[i]),
    teacher: shown(part.teacher_log_prob[i]), [DIFFERENCE]: shown(part.difference[i]),
    [answer.signal_name ?? "signal"]: shown(part.signal[i]), entropy: shown(part.entropy[i]),
    "item mass": shown(part.extend_mass[i]) };
  const list = make("dl", {}, ...Object.entries(facts).map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));
  const sentences = [part.item[i] && "An item token", answer.kind === "validation" && "Validation: no update follows",
    (answer.kind !== "validation" || state !== "trained") && (REASONS[state] ?? state)];
  byId("panel").replaceChildren(list, make("p", { className: "soft" }, `${sentences.filter(Boolean).join(". ")}.`));
}

// ---------------------------------------------------------------- keys and pointer

function pressed(event) {
  const typing = event.target.closest("input, select, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey || state.view !== "answers") return;
  if (typing) return void (event.key === "Escape" && event.target.blur());
  if (event.key === "Escape" && state.open) return closeAnswer();
  const inList = event.target === byId("list") || event.target === document.body;
  const by = { j: 1, k: -1, ...(inList ? { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8 } : {}) }[event.key];
  if (by) event.preventDefault(), move(by);
  else if (event.key === "Enter" && inList) openChosen();
}

function listen() {
  for (const button of document.querySelectorAll("nav button"))
    button.addEventListener("click", () => show({ view: button.dataset.view }, true));
  for (const input of document.querySelectorAll("[data-key]"))
    input.addEventListener("input", () => show({ [input.dataset.key]: input.value }));
  byId("list").addEventListener("scroll", drawRows, { passive: true });
  byId("list").addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (row) (chosen = Number(row.dataset.place)), openChosen();
  });
  byId("close").addEventListener("click", closeAnswer);
  byId("previous").addEventListener("click", () => move(-1));
  byId("next").addEventListener("click", () => move(1));
  document.addEventListener("keydown", pressed);
  addEventListener("popstate", () => render(fromAddress()));
  addEventListener("hashchange", () => render(fromAddress()));
  addEventListener("resize", drawRows);
}

async function start() {
  const [about, read, columns] = await Promise.all(["about", "curves", "answers"].map(unpackJson));
  byId("notes").replaceChildren(...about.notes.map((note) => make("p", {}, note)));
  document.querySelector("h1").title = about.folder;
  byId("filters").open = innerWidth > 600;
  state = fromAddress();
  curves = read;
  drawGroups();
  takeAnswers(columns);
  listen();
  render(state);
  document.body.dataset.ready = "yes";
}

start();
