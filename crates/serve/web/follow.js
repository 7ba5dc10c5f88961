// Keeps the end of something that grows in view, until its reader scrolls up; a button leads back.

import { h } from "/assets/dom.js";

/** Nearer to the end than this is at the end. */
const NEAR = 24;

/**
 * `scroller`: what scrolls, null for the page; `content`: what grows in it. Gives `{ button, toEnd, stop }`: a button to be
 * placed where it can be seen, `toEnd()` to follow from now on, `stop()` to end all this.
 */
export function follow(scroller, content) {
  const box = scroller ?? document.scrollingElement;
  const source = scroller ?? window;
  const gone = new AbortController();
  const button = h("button", { type: "button", class: "jump", hidden: true, onclick: () => toEnd() }, "Jump to end");
  let following = true;
  let [top, height] = [box.scrollTop, box.scrollHeight];

  const left = () => box.scrollHeight - box.clientHeight - box.scrollTop;
  const look = () => (button.hidden = following || left() <= NEAR || !content.childElementCount);
  function settle() {
    if (following) box.scrollTop = box.scrollHeight;
    [top, height] = [box.scrollTop, box.scrollHeight];
    look();
  }
  function toEnd() {
    following = true;
    settle();
  }
  source.addEventListener("scroll", () => {
    // What became shorter moves by itself; that is nobody's wish.
    if (box.scrollTop < top && box.scrollHeight >= height) following = false;
    else if (box.scrollTop > top && left() <= NEAR) following = true;
    [top, height] = [box.scrollTop, box.scrollHeight];
    look();
  }, { passive: true, signal: gone.signal });
  // Before the scroll itself: text that comes in between would undo it.
  source.addEventListener("wheel", (event) => {
    if (event.deltaY < 0 && box.scrollTop > 0) following = false;
    look();
  }, { passive: true, signal: gone.signal });
  const observer = new ResizeObserver(settle);
  observer.observe(content);
  return {
    button,
    toEnd,
    stop() {
      observer.disconnect();
      gone.abort();
    },
  };
}
