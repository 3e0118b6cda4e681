// Three planes of a scan in NiiVue, as the reader study and the page of `synthesize --html` show
// them. A plain script, since a page from the disk may load no modules; the page's own script makes
// the viewer `nv`.
"use strict";

const $ = (id) => document.getElementById(id);
const AXIAL = 0, CORONAL = 1, SAGITTAL = 2; // NiiVue's numbers
const LAYOUTS = [
  [[AXIAL, 0, 0, 0.64, 1], [CORONAL, 0.64, 0, 0.36, 0.5], [SAGITTAL, 0.64, 0.5, 0.36, 0.5]],
  [[AXIAL, 0, 0, 1, 1]],
  [[CORONAL, 0, 0, 1, 1]],
  [[SAGITTAL, 0, 0, 1, 1]],
];
const AXIS = { [AXIAL]: 2, [CORONAL]: 1, [SAGITTAL]: 0 }; // voxel axis that a plane steps along
const VIEWER = { // options of NiiVue
  backColor: [0, 0, 0, 1],
  crosshairWidthUnit: "percent", // of the field
  dragAndDropEnabled: false,
  fontColor: [0.72, 0.76, 0.79, 1],
  fontMinPx: 11,
  isAntiAlias: false,
  isCornerOrientationText: true, // away from the cross
  isRadiologicalConvention: true,
  loadingText: "",
  logLevel: "error",
  multiplanarShowRender: 0,
  show3Dcrosshair: false,
  tileMargin: 2,
};

let layout = 0;
let pointer = null; // in canvas pixels

function alarm(words) {
  $("alarm").hidden = !words;
  $("alarm").textContent = words || "";
}

const guarded = (action) => (...args) => Promise.resolve(action(...args)).catch((e) => alarm(e.message));

function checkWebGL() {
  if (!document.createElement("canvas").getContext("webgl2")) {
    throw new Error("This browser has no WebGL2, which the viewer needs: use another.");
  }
}

async function attach() {
  await nv.attachToCanvas($("canvas"));
  const { crosshair, windowing, pan } = niivue.DRAG_MODE;
  nv.setMouseEventConfig({
    leftButton: { primary: crosshair, withShift: pan, withCtrl: crosshair },
    rightButton: windowing,
    centerButton: pan,
  });
}

function setLayout(k) {
  layout = k;
  nv.setCustomLayout(LAYOUTS[k].map(([sliceType, ...position]) => ({ sliceType, position })));
}

function isWindow(width, level) { // whether it is the one shown
  const { cal_min: low, cal_max: high } = nv.volumes[0];
  return Math.abs(high - low - width) < 1 && Math.abs((high + low) / 2 - level) < 1;
}

function placeText({ vox, values }) { // of NiiVue's onLocationChange
  const dims = nv.volumes[0].dims;
  const at = [2, 1, 0].map((k) => `${["sag", "cor", "ax"][k]} ${Math.round(vox[k]) + 1}/${dims[k + 1]}`);
  return `${at.join(" · ")} · ${Math.round(values[0].value)} HU`;
}

function zoom(factor) {
  const pan = nv.scene.pan2Dxyzmm;
  const next = Math.min(10, Math.max(1, pan[3] * factor));
  if (next === 1) return nv.setPan2Dxyzmm([0, 0, 0, 1]);
  const mm = nv.frac2mm(nv.scene.crosshairPos); // stays where it is
  nv.setPan2Dxyzmm([0, 1, 2].map((k) => pan[k] + (pan[3] - next) * mm[k]).concat(next));
}

function plane() { // the one under the pointer, or the first shown
  const tile = pointer && nv.screenSlices.find(({ leftTopWidthHeight: [x, y, w, h] }) =>
    pointer[0] >= x && pointer[0] < x + w && pointer[1] >= y && pointer[1] < y + h);
  return tile && tile.axCorSag in AXIS ? tile.axCorSag : LAYOUTS[layout][0][0];
}

function scroll(steps) {
  const move = [0, 0, 0];
  move[AXIS[plane()]] = steps;
  nv.moveCrosshairInVox(...move);
}
