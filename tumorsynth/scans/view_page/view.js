// The page of `synthesize --html`: scans before and after, as SCANS lists them. It works from the
// disk, where a browser fetches nothing: the voxels of a scan are in a script of their own.
"use strict";

const PRESETS = [ // name, width, level in HU
  ["Soft tissue", 300, 50], // as in the previews
  ["Liver", 200, 80],
  ["Lung", 1300, -500], // as in the previews
  ["Bone", 1800, 400],
];
let current = -1;
let scan = null; // what its script says
let states = null; // voxels {before, after}
let after = true;
let outline = true;
let cross = false;
const waiting = new Map(); // by name: takes what the script of a scan says

const nv = new niivue.Niivue({ ...VIEWER, crosshairColor: [0.29, 0.64, 0.78, 0.8], crosshairGap: 40 });

// ---- a scan's script

function tumorsynthScan(content) { waiting.get(content.name)?.(content); }

function load(name) {
  return new Promise((resolve, reject) => {
    waiting.set(name, resolve);
    const script = document.createElement("script");
    script.src = `view/scans/${encodeURIComponent(name)}.js`;
    script.onload = () => script.remove();
    script.onerror = () => reject(new Error(
      `view/scans/${name}.js cannot be read: keep the folder "view" beside this page.`));
    document.head.append(script);
  });
}

async function unzip(text) {
  if (typeof DecompressionStream === "undefined") {
    throw new Error("This browser is too old to unpack the scans (no DecompressionStream): use a newer one.");
  }
  const zipped = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([zipped]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

// ---- what is shown

function setState(isAfter) {
  after = isAfter;
  nv.volumes[0].img = after ? states.after : states.before;
  nv.updateGLVolume();
  for (const button of $("states").children) {
    button.setAttribute("aria-checked", (button.dataset.after === "true") === after);
  }
  nv.createOnLocationChange(); // the value at the cross
  const now = scan.tumors.length ? "with synthetic tumours" : "no synthetic tumour";
  $("stamp").textContent = after ? now : "as it was";
}

function setOutline(shown) {
  outline = shown;
  $("outline").setAttribute("aria-pressed", shown);
  nv.drawRimOpacity = shown ? 1 : 0;
  nv.setDrawOpacity(shown ? 0.001 : 0); // the inside stays as it is
  nv.drawScene();
}

function setCross(shown) {
  cross = shown;
  $("cross").setAttribute("aria-pressed", shown);
  nv.setCrosshairWidth(shown ? 0.25 : 0);
}

function setWindow(width, level) {
  nv.volumes[0].cal_min = level - width / 2;
  nv.volumes[0].cal_max = level + width / 2;
  nv.updateGLVolume();
  showWindow();
}

function showWindow() {
  PRESETS.forEach(([, width, level], k) => {
    $("windows").children[k].setAttribute("aria-pressed", isWindow(width, level));
  });
}

function moveTo(voxel) {
  nv.scene.crosshairPos = nv.vox2frac(voxel);
  nv.createOnLocationChange();
  nv.drawScene();
}

function home() {
  const dims = nv.volumes[0].dims;
  nv.setPan2Dxyzmm([0, 0, 0, 1]);
  moveTo(scan.tumors.length ? scan.tumors[0].at : [1, 2, 3].map((k) => Math.floor(dims[k] / 2)));
}

nv.onLocationChange = (location) => { $("place").textContent = placeText(location); };
nv.onIntensityChange = showWindow;

// ---- scans

function cells(tag, texts) {
  const row = document.createElement("tr");
  row.append(...texts.map((text) => Object.assign(document.createElement(tag), { textContent: text })));
  return row;
}

const figure = (value, digits) => (value === null ? "" : value.toFixed(digits));

function showReport() {
  $("title").textContent = scan.name;
  const rows = scan.tumors.map((tumor, k) => {
    const row = cells("td", ["", figure(tumor.diameter_mm, 1), figure(tumor.hu_change, 0), figure(tumor.visibility, 1)]);
    const button = Object.assign(document.createElement("button"), { textContent: `tumour ${k + 1}` });
    button.onclick = () => moveTo(tumor.at);
    row.firstChild.append(button);
    return row;
  });
  $("tumors").replaceChildren(...(rows.length
    ? [cells("th", ["", "mm", "HU", "visibility"]), ...rows]
    : [cells("td", ["no tumour"])]));
  $("skipped").replaceChildren(...scan.skipped.map((reason) =>
    Object.assign(document.createElement("li"), { textContent: `skipped: ${reason}` })));
  $("about").textContent = scan.about;
  [...$("scans").children].forEach((button, k) => button.setAttribute("aria-current", k === current));
}

async function open(k) {
  current = k;
  $("view").setAttribute("aria-busy", true);
  alarm(null);
  const content = await load(SCANS[k]);
  const [before, change, mask] = await Promise.all([content.nifti, content.change, content.mask].map(unzip));
  if (current !== k) return; // another one was chosen meanwhile
  scan = content;
  nv.closeDrawing();
  nv.volumes.slice().forEach((volume) => nv.removeVolume(volume));
  await nv.loadFromArrayBuffer(before, "scan.nii");
  if (current !== k) return;
  const volume = nv.volumes[0];
  const steps = new Int16Array(change);
  states = { before: volume.img, after: volume.img.map((value, at) => value + steps[at]) };
  nv.createEmptyDrawing();
  nv.drawBitmap.set(new Uint8Array(mask));
  nv.refreshDrawing(false);
  showReport();
  setState(after);
  setWindow(scan.window[1] - scan.window[0], (scan.window[0] + scan.window[1]) / 2);
  setLayout(layout);
  setOutline(outline);
  setCross(cross);
  home();
  $("view").setAttribute("aria-busy", false);
}

const step = (by) => open((current + by + SCANS.length) % SCANS.length);

function listen() {
  for (const button of $("states").children) button.onclick = () => setState(button.dataset.after === "true");
  $("outline").onclick = () => setOutline(!outline);
  $("cross").onclick = () => setCross(!cross);
  $("layout").onclick = () => setLayout((layout + 1) % LAYOUTS.length);
  $("home").onclick = home;
  $("windows").append(...PRESETS.map(([name, width, level]) => {
    const button = Object.assign(document.createElement("button"), { textContent: name });
    button.title = `W ${width} · L ${level} HU`;
    button.onclick = () => setWindow(width, level);
    return button;
  }));
  $("scans").append(...SCANS.map((name, k) => {
    const button = Object.assign(document.createElement("button"), { textContent: name });
    button.onclick = guarded(() => open(k));
    return button;
  }));
  $("scans-title").hidden = $("scans").hidden = SCANS.length < 2;
  const keys = {
    b: () => setState(!after), o: () => setOutline(!outline), c: () => setCross(!cross),
    x: () => setLayout((layout + 1) % LAYOUTS.length), " ": home, "+": () => zoom(1.2), "-": () => zoom(1 / 1.2),
    ArrowUp: () => scroll(1), ArrowDown: () => scroll(-1), PageUp: () => scroll(5), PageDown: () => scroll(-5),
    ArrowLeft: guarded(() => step(-1)), ArrowRight: guarded(() => step(1)),
  };
  addEventListener("keydown", (event) => {
    const action = keys[event.key.length > 1 ? event.key : event.key.toLowerCase()];
    if (!action || event.ctrlKey || event.metaKey || event.altKey || scan === null) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    action();
  }, true);
  $("canvas").addEventListener("mousemove", (event) => {
    const ratio = nv.uiData.dpr || 1;
    pointer = [event.offsetX * ratio, event.offsetY * ratio];
  });
  $("canvas").addEventListener("mouseleave", () => { pointer = null; });
  $("canvas").addEventListener("wheel", (event) => {
    if (scan === null) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    if (event.ctrlKey) zoom(event.deltaY > 0 ? 1 / 1.2 : 1.2);
    else scroll(event.deltaY > 0 ? -1 : 1);
  }, { capture: true, passive: false });
}

guarded(async () => {
  checkWebGL();
  listen();
  await attach();
  await open(0);
})();
