// Conversations in the browser's database: a short head of each for the list, and the whole beside it. What a
// conversation holds is not its business.

export const MOST = 500; // conversations; beyond that the ones longest untouched go

export class Store {
  static async open() {
    const request = indexedDB.open("daedal", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("heads", { keyPath: "id" });
      request.result.createObjectStore("conversations", { keyPath: "id" });
    };
    const database = await result(request);
    database.onversionchange = () => database.close();
    return new Store(database);
  }

  constructor(database) {
    this.database = database;
    this.tabs = new BroadcastChannel("daedal");
  }

  // Calls `act` when another tab has changed something.
  watch(act) {
    this.tabs.onmessage = act;
  }

  // {id, title, updated}, the latest first.
  async heads() {
    const heads = await result(this.database.transaction("heads").objectStore("heads").getAll());
    return heads.sort((one, other) => other.updated - one.updated);
  }

  read(id) {
    return result(this.database.transaction("conversations").objectStore("conversations").get(id));
  }

  readAll() {
    return result(this.database.transaction("conversations").objectStore("conversations").getAll());
  }

  // Begins at once, so that it may be called when the page is about to go.
  save(conversation) {
    const { id, title, updated } = conversation;
    return this.change((heads, conversations) => {
      heads.put({ id, title, updated });
      conversations.put(conversation);
    });
  }

  remove(...ids) {
    return this.change((heads, conversations) => {
      for (const id of ids) {
        heads.delete(id);
        conversations.delete(id);
      }
    });
  }

  async trim(most = MOST) {
    const beyond = (await this.heads()).slice(most);
    if (beyond.length) await this.remove(...beyond.map(({ id }) => id));
  }

  async change(write) {
    const transaction = this.database.transaction(["heads", "conversations"], "readwrite");
    write(transaction.objectStore("heads"), transaction.objectStore("conversations"));
    await new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = () => reject(transaction.error);
      transaction.commit();
    });
    this.tabs.postMessage("changed");
  }
}

function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
