// The page of a reader study: start, cases, done. Of each case it knows an opaque id and a voxel.
"use strict";

const PRESETS = [ // name, key, width, level in HU
  ["Liver", "l", 200, 80],
  ["Abdomen", "a", 400, 40],
  ["Mediastinum", "m", 350, 50],
  ["Lung", "u", 1500, -600],
  ["Bone", "b", 1800, 400],
];
const CROSS = [0.95, 0.75, 0.2, 0.75];

let reader = null; // opaque id
let cases = []; // {id, mark, answer, confidence}
let current = 0;
let draft = { answer: null, confidence: null };
let preset = 1; // kept from case to case, like the layout of planes.js
let crossShown = true;
let ready = false; // whether the current case is on the screen
const clock = { spent: 0, since: null };

const nv = new niivue.Niivue({
  ...VIEWER,
  crosshairColor: CROSS,
  crosshairGap: 60, // times the line's width: keeps the lesion clear
});

// ---- requests to the server

async function post(name, data) {
  let response;
  try {
    response = await fetch(`api/${name}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(data),
    });
  } catch {
    throw new Error("The server does not answer: restart it, then repeat this step.");
  }
  const reply = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(reply.error || `The server refused this (${response.status}).`);
  alarm(null);
  return reply;
}

function show(id) {
  for (const one of ["start", "reading", "done"]) $(one).hidden = one !== id;
}

// ---- time with the case on the screen

function tick(run) {
  const now = performance.now();
  if (clock.since !== null) clock.spent += now - clock.since;
  clock.since = run && ready && !document.hidden ? now : null;
}

// ---- the viewer

function setWindow(k) {
  preset = k;
  const [, , width, level] = PRESETS[k];
  if (nv.volumes.length) {
    nv.volumes[0].cal_min = level - width / 2;
    nv.volumes[0].cal_max = level + width / 2;
    nv.updateGLVolume();
  }
  showWindow();
}

function showWindow() {
  if (!nv.volumes.length) return;
  const { cal_min: low, cal_max: high } = nv.volumes[0];
  $("window-text").textContent = `W ${Math.round(high - low)} · L ${Math.round((high + low) / 2)} HU`;
  PRESETS.forEach(([, , width, level], k) => {
    $("windows").children[k].setAttribute("aria-pressed", isWindow(width, level));
  });
}

function setCross(shown) {
  crossShown = shown;
  $("cross").setAttribute("aria-pressed", shown);
  nv.setCrosshairWidth(shown ? 0.25 : 0);
}

function home() {
  const dims = nv.volumes[0].dims;
  const mark = cases[current].mark || [1, 2, 3].map((k) => Math.floor(dims[k] / 2));
  nv.scene.crosshairPos = nv.vox2frac(mark);
  nv.setPan2Dxyzmm([0, 0, 0, 1]);
  nv.createOnLocationChange();
}

nv.onLocationChange = (location) => { $("place").textContent = `${placeText(location)} at the cross`; };
nv.onIntensityChange = showWindow;

// ---- cases

async function open(k) {
  tick(false);
  ready = false;
  clock.spent = 0;
  current = k;
  draft = { answer: cases[k].answer, confidence: cases[k].confidence };
  $("view").setAttribute("aria-busy", true);
  note("");
  render();
  const id = cases[k].id;
  const [, , width, level] = PRESETS[preset];
  try {
    await nv.loadVolumes([{
      url: new URL(`volume/${id}.nii`, location.href).href,
      name: "case.nii",
      cal_min: level - width / 2,
      cal_max: level + width / 2,
    }]);
  } catch {
    throw new Error("The case cannot be loaded: is the server running? Choose the case again.");
  }
  if (cases[current].id !== id) return; // the reader has chosen another case meanwhile
  alarm(null);
  setWindow(preset);
  setLayout(layout);
  setCross(crossShown);
  home();
  $("view").setAttribute("aria-busy", false);
  ready = true;
  tick(true);
}

function choose(part) {
  if (!ready) return;
  Object.assign(draft, part);
  note("");
  render();
}

const changed = () =>
  draft.answer !== cases[current].answer || draft.confidence !== cases[current].confidence;

async function save() {
  if (!ready) return;
  if (!draft.answer || !draft.confidence) {
    return note(draft.answer ? "How sure are you? Choose 1 to 5." : "Choose real or synthetic first.");
  }
  const one = cases[current];
  if (changed()) {
    tick(true);
    const seconds = clock.spent / 1000;
    await post("answer", { reader, case: one.id, ...draft, seconds });
    clock.spent = 0;
    Object.assign(one, draft);
  }
  const after = [...cases.keys()].map((k) => (current + 1 + k) % cases.length);
  const next = after.find((k) => !cases[k].answer);
  if (next !== undefined) return open(next);
  render();
  note("Saved. All cases are answered: review them, or close the study.");
}

function note(words) { $("note").textContent = words; }

function render() {
  const answered = cases.filter((one) => one.answer).length;
  $("case-title").textContent = `Case ${current + 1} of ${cases.length}`;
  $("progress").max = cases.length;
  $("progress").value = answered;
  $("answered").textContent = `${answered} answered`;
  for (const button of $("answers").children) {
    button.setAttribute("aria-checked", button.dataset.answer === draft.answer);
  }
  for (const button of $("confidence").children) {
    button.setAttribute("aria-checked", Number(button.dataset.confidence) === draft.confidence);
  }
  $("save").disabled = !draft.answer || !draft.confidence;
  $("finish").hidden = answered < cases.length;
  $("finish").classList.toggle("primary", answered === cases.length && !changed());
  $("save").classList.toggle("primary", answered < cases.length || changed());
  [...$("cases").children].forEach((button, k) => {
    button.classList.toggle("answered", Boolean(cases[k].answer));
    button.setAttribute("aria-current", k === current);
  });
}

const step = (by) => open((current + by + cases.length) % cases.length);

// ---- start and end

async function begin(name) {
  const study = await post("start", { name });
  reader = study.reader;
  cases = study.cases;
  sessionStorage.setItem("name", study.name); // so that a reload continues
  $("reader").textContent = study.name;
  if (study.finished) return done(await post("results", { reader }));
  $("cases").replaceChildren(...cases.map((_, k) => {
    const button = document.createElement("button");
    button.textContent = k + 1;
    button.onclick = guarded(() => open(k));
    return button;
  }));
  show("reading");
  if (!nv.canvas) {
    checkWebGL();
    await attach();
  }
  const first = cases.findIndex((one) => !one.answer);
  await open(first < 0 ? 0 : first);
}

function done({ table, convention }) {
  tick(false);
  ready = false;
  show("done");
  $("table").replaceChildren(...table.map((cells, k) => {
    const line = document.createElement("tr");
    line.append(...cells.map((text) => {
      const cell = document.createElement(k ? "td" : "th");
      cell.textContent = text;
      return cell;
    }));
    return line;
  }));
  $("convention").textContent = convention + ".";
}

$("finish").onclick = () => $("sure-finish").showModal();
$("sure-finish").onclose = guarded(async () => {
  if ($("sure-finish").returnValue === "yes") done(await post("finish", { reader }));
});
$("start-form").onsubmit = (event) => {
  event.preventDefault();
  return guarded(begin)($("name").value);
};

// ---- buttons, keys, mouse

PRESETS.forEach(([name, key, width, level], k) => {
  const button = document.createElement("button");
  button.innerHTML = `${name} <kbd>${key.toUpperCase()}</kbd>`;
  button.title = `W ${width} L ${level} HU`;
  button.onclick = () => setWindow(k);
  $("windows").append(button);
});
$("help-windows").innerHTML = PRESETS.map(([, key]) => `<kbd>${key.toUpperCase()}</kbd>`).join(" ");
for (let k = 1; k <= 5; k++) {
  const button = document.createElement("button");
  button.textContent = k;
  button.dataset.confidence = k;
  button.setAttribute("role", "radio");
  button.onclick = () => choose({ confidence: k });
  $("confidence").append(button);
}
for (const button of $("answers").children) {
  button.onclick = () => choose({ answer: button.dataset.answer });
}
$("save").onclick = guarded(save);
$("previous").onclick = guarded(() => step(-1));
$("next").onclick = guarded(() => step(1));
$("layout").onclick = () => setLayout((layout + 1) % LAYOUTS.length);
$("home").onclick = () => ready && home();
$("cross").onclick = () => setCross(!crossShown);
$("help-button").onclick = () => $("help").showModal();

const KEYS = {
  r: () => choose({ answer: "real" }),
  s: () => choose({ answer: "synthetic" }),
  Enter: guarded(save),
  ArrowLeft: guarded(() => step(-1)),
  ArrowRight: guarded(() => step(1)),
  ArrowUp: () => scroll(1),
  ArrowDown: () => scroll(-1),
  PageUp: () => scroll(5),
  PageDown: () => scroll(-5),
  "+": () => zoom(1.25),
  "=": () => zoom(1.25),
  "-": () => zoom(0.8),
  " ": home,
  x: () => $("layout").click(),
  c: () => $("cross").click(),
  h: () => $("help").showModal(),
  "?": () => $("help").showModal(),
};
for (let k = 1; k <= 5; k++) KEYS[k] = () => choose({ confidence: k });
PRESETS.forEach(([, key], k) => { KEYS[key] = () => setWindow(k); });

function pressed(event) {
  if ($("reading").hidden || document.querySelector("dialog[open]")) return;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const action = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  event.stopPropagation(); // the viewer binds keys, too
  if (!action) return;
  event.preventDefault();
  if (event.type === "keydown" && (ready || event.key.startsWith("Arrow")) && !(event.repeat && event.key === "Enter")) action();
}
addEventListener("keydown", pressed, true);
addEventListener("keyup", pressed, true);

$("view").addEventListener("pointermove", (event) => {
  const box = $("canvas").getBoundingClientRect();
  const dense = $("canvas").width / box.width;
  pointer = [(event.clientX - box.left) * dense, (event.clientY - box.top) * dense];
});
$("view").addEventListener("pointerleave", () => { pointer = null; });
$("view").addEventListener("wheel", (event) => {
  if (!event.ctrlKey) return;
  event.preventDefault();
  event.stopPropagation();
  zoom(event.deltaY < 0 ? 1.1 : 1 / 1.1);
}, { capture: true, passive: false });
$("view").addEventListener("dblclick", (event) => event.stopPropagation(), true); // keeps the window
document.addEventListener("visibilitychange", () => tick(true));

guarded(async () => {
  const answer = await fetch("api/study").catch(() => null);
  if (!answer || !answer.ok) throw new Error("The server does not answer: start it, then reload this page.");
  const study = await answer.json();
  $("start-count").textContent = study.cases;
  for (const one of document.querySelectorAll(".if-marked")) one.hidden = !study.marked;
  const fixed = study.reader_name !== null;
  $("name").hidden = $("name-label").hidden = fixed;
  $("name").required = !fixed;
  show("start");
  const name = sessionStorage.getItem("name");
  if (fixed ? name === study.reader_name : name) await begin(name);
  else if (!fixed) $("name").focus();
})();
