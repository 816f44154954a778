// Numbers as people read them.

export function bytes(count) {
  return scaled(count, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]);
}

export function work(flops) {
  return scaled(flops, 1000, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"]);
}

export function amount(count) {
  const short = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
  if (count >= 1e9) return `${short.format(count / 1e9)} B`;
  if (count >= 1e6) return `${short.format(count / 1e6)} M`;
  return short.format(count);
}

export function whole(count) {
  return new Intl.NumberFormat("en").format(count);
}

// Two figures that count, and no exponent.
export function figures(value) {
  return new Intl.NumberFormat("en", { maximumSignificantDigits: 2 }).format(value);
}

export function seconds(value) {
  if (value < 60) return `${value.toFixed(value < 10 ? 1 : 0)} s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

export function perSecond(rate) {
  return `${rate.toFixed(rate < 100 ? 1 : 0)} tokens/s`;
}

// A part of a whole in percent, exact enough for small ones.
export function percent(part, all) {
  const share = (100 * part) / all;
  return `${share.toFixed(share > 0 && share < 10 ? 1 : 0)}%`;
}

function scaled(count, step, units) {
  let value = count;
  let unit = 0;
  while (value >= step && unit < units.length - 1) {
    value /= step;
    unit += 1;
  }
  return `${value.toFixed(unit && value < 10 ? 1 : 0)} ${units[unit]}`;
}
